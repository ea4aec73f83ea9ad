//! Secrets that are zeroized when they go, never cloned, and never printed.

use std::fmt;

use zeroize::{Zeroize, Zeroizing};

/// Secret bytes of any length.
pub struct SecretBytes(Zeroizing<Vec<u8>>);

impl SecretBytes {
    /// Takes over `bytes`; the caller keeps no copy.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The secret, for the one operation that needs it.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// The secret as a key of exactly `N` bytes; `None` when it has another length.
    pub fn to_array<const N: usize>(&self) -> Option<SecretArray<N>> {
        SecretArray::try_fill(|slot| {
            if self.0.len() != N {
                return Err(());
            }
            slot.copy_from_slice(&self.0);
            Ok(())
        })
        .ok()
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretBytes(…)")
    }
}

/// A secret of `N` bytes. Wrap it in a type that says what it is for.
pub struct SecretArray<const N: usize>(Box<[u8; N]>);

impl<const N: usize> SecretArray<N> {
    /// Lets `fill` write the secret in place, so that no copy stays on a stack.
    pub fn fill(fill: impl FnOnce(&mut [u8; N])) -> Self {
        let mut secret = Self(Box::new([0; N]));
        fill(&mut secret.0);
        secret
    }

    /// [`fill`](Self::fill), for what can fail.
    pub fn try_fill<E>(fill: impl FnOnce(&mut [u8; N]) -> Result<(), E>) -> Result<Self, E> {
        let mut secret = Self(Box::new([0; N]));
        fill(&mut secret.0)?;
        Ok(secret)
    }

    /// A new secret from the operating system's random source.
    pub fn random() -> Self {
        use rand_core::RngCore as _;
        Self::fill(|slot| rand_core::OsRng.fill_bytes(slot))
    }

    /// The secret, for the one operation that needs it.
    pub fn expose(&self) -> &[u8; N] {
        &self.0
    }
}

impl<const N: usize> Drop for SecretArray<N> {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl<const N: usize> fmt::Debug for SecretArray<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretArray<{N}>(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_printed() {
        let secret = SecretBytes::new(b"hunter2".to_vec());
        let key = SecretArray::<32>::random();
        assert!(!format!("{secret:?} {key:?}").contains("hunter2"));
        assert_eq!(format!("{key:?}"), "SecretArray<32>(…)");
        assert!(secret.to_array::<8>().is_none());
        assert_eq!(secret.to_array::<7>().unwrap().expose(), b"hunter2");
    }
}
