//! The line between bytes that came from outside and bytes that passed a check.

/// A value from a registry, a disk, a directory or the network that nothing has vouched for yet.
///
/// It can be looked at, so that it can be checked or reported. Mounts, unpacking and key release do not take it.
#[derive(Clone, Debug)]
pub struct Untrusted<T>(T);

impl<T> Untrusted<T> {
    /// Marks a value that came from outside.
    pub fn new(value: T) -> Self {
        Self(value)
    }

    /// Looks at the value, to check or to report it.
    pub fn peek(&self) -> &T {
        &self.0
    }

    /// Runs `check` and, where it holds, makes the value trusted. The only way to a [`Verified`].
    pub fn verify<E>(self, check: impl FnOnce(&T) -> Result<(), E>) -> Result<Verified<T>, E> {
        check(&self.0)?;
        Ok(Verified(self.0))
    }

    /// [`verify`](Self::verify), where the check also makes another value of it (parses, decrypts).
    pub fn verify_into<U, E>(self, check: impl FnOnce(T) -> Result<U, E>) -> Result<Verified<U>, E> {
        check(self.0).map(Verified)
    }
}

/// A value that passed its check. Only [`Untrusted::verify`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified<T>(T);

impl<T> Verified<T> {
    /// The value, which may be used for anything.
    pub fn get(&self) -> &T {
        &self.0
    }

    /// The value, which may be used for anything.
    pub fn into_inner(self) -> T {
        self.0
    }

    /// A part of a checked value is checked.
    pub fn map<U>(self, part: impl FnOnce(T) -> U) -> Verified<U> {
        Verified(part(self.0))
    }
}
