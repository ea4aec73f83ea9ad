//! Serves memory over NBD until standard input ends, to measure the server alone: `cargo run --release --example nbd_memory -- SOCKET
//! MIB [null|slow]`. With `null`, nothing is stored, and reads find zeroes; with `slow`, the store says that it is slow.

#![expect(clippy::print_stderr, reason = "it is a program")]

use std::{
    env, io,
    sync::{Arc, RwLock},
};

use nacre_core::{BlockError, BlockStore, check_range};
use nacre_export::{
    FrontEnd as _,
    nbd::{Listen, NbdServer, NbdSettings},
};

const PIECE: u64 = 1 << 20;

struct Memory {
    pieces: Vec<RwLock<Vec<u8>>>,
    null: bool,
    slow: bool,
}

impl Memory {
    /// Does something with each part of the range that lies in one piece.
    fn each(&self, offset: u64, length: usize, mut each: impl FnMut(&RwLock<Vec<u8>>, usize, std::ops::Range<usize>)) {
        let mut done = 0;
        while done < length {
            let at = offset + done as u64;
            let inside = usize::try_from(at % PIECE).unwrap_or_default();
            let count = (length - done).min(usize::try_from(PIECE).unwrap_or(usize::MAX) - inside);
            if let Some(piece) = usize::try_from(at / PIECE).ok().and_then(|at| self.pieces.get(at)) {
                each(piece, inside, done..done + count);
            }
            done += count;
        }
    }
}

impl BlockStore for Memory {
    fn size(&self) -> u64 {
        self.pieces.len() as u64 * PIECE
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        check_range("read", offset, buffer.len() as u64, self.size())?;
        if !self.null {
            self.each(offset, buffer.len(), |piece, inside, range| {
                if let (Ok(piece), Some(part)) = (piece.read(), buffer.get_mut(range)) {
                    match piece.get(inside..inside + part.len()) {
                        Some(data) => part.copy_from_slice(data),
                        None => part.fill(0),
                    }
                }
            });
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        check_range("write", offset, data.len() as u64, self.size())?;
        if !self.null {
            self.each(offset, data.len(), |piece, inside, range| {
                if let (Ok(mut piece), Some(data)) = (piece.write(), data.get(range)) {
                    if piece.is_empty() {
                        piece.resize(usize::try_from(PIECE).unwrap_or(0), 0);
                    }
                    if let Some(place) = piece.get_mut(inside..inside + data.len()) {
                        place.copy_from_slice(data);
                    }
                }
            });
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), BlockError> {
        check_range("trim", offset, length, self.size())
    }

    fn is_slow(&self) -> bool {
        self.slow
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = env::args().skip(1);
    let socket = arguments.next().ok_or("SOCKET is missing")?;
    let mib: usize = arguments.next().ok_or("MIB is missing")?.parse()?;
    let kind = arguments.next();
    let store = Memory {
        pieces: (0..mib).map(|_| RwLock::default()).collect(),
        null: kind.as_deref() == Some("null"),
        slow: kind.as_deref() == Some("slow"),
    };
    let mut server = NbdServer::start(Arc::new(store), NbdSettings::new(Listen::Unix(socket.into())))?;
    eprintln!("{}", server.device());
    io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(server.stop()?)
}
