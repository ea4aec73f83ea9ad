//! Prints how fast one core decrypts and authenticates layers: `cargo run --release --example decrypt -p nacre-oci`.
#![expect(clippy::print_stdout, reason = "a measurement prints its figures")]

use std::time::Instant;

use nacre_core::Digest;
use nacre_oci::crypt::{CryptError, LayerEncryptor};

/// A gibibyte, in pieces of this many bytes.
const PIECE: usize = 256 << 10;

fn main() -> Result<(), CryptError> {
    let mut data = vec![1; PIECE];
    let mut encryptor = LayerEncryptor::new()?;
    encryptor.update(&mut data)?;
    let (secret, public) = encryptor.finish();
    for (what, diff_id) in
        [("plaintext hashed here", Digest::sha256(b"")), ("plaintext hashed as diff_id", *secret.digest())]
    {
        let mut decryptor = secret.decryptor(&public)?.with_diff_id(&diff_id);
        let start = Instant::now();
        for _ in 0..4096 {
            decryptor.update(&mut data)?;
        }
        println!("{what}: {:.0} MB/s", 1_073.741_824 / start.elapsed().as_secs_f64());
    }
    Ok(())
}
