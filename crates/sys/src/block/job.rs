//! One transfer between memory and a file, carried on until it is done, and the system calls that do so one after the other.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd as _, BorrowedFd},
};

use io_uring::{opcode, squeue, types};
use rustix::io::Errno;

/// The most buffers that one system call takes (IOV_MAX of Linux).
const MAX_BUFFERS: usize = 1024;

/// How often one transfer is tried again without getting on, before its error counts: signals and full queues pass, so this is
/// only there to end.
const MAX_RETRIES: u32 = 10_000;

/// Where from or where to. The buffers shrink from the front as the transfer gets on.
enum Buffers<'a> {
    Read(Vec<IoSliceMut<'a>>),
    Write(Vec<IoSlice<'a>>),
}

/// A transfer of the range that starts at `offset`.
pub(super) struct Job<'a> {
    file: BorrowedFd<'a>,
    offset: u64,
    left: u64,
    buffers: Buffers<'a>,
    zeroes_beyond: bool,
    retries: u32,
    outcome: io::Result<()>,
}

impl<'a> Job<'a> {
    pub(super) fn read(file: BorrowedFd<'a>, offset: u64, buffers: Vec<IoSliceMut<'a>>) -> Self {
        let left = buffers.iter().map(|buffer| buffer.len() as u64).sum();
        Self { file, offset, left, buffers: Buffers::Read(buffers), zeroes_beyond: false, retries: 0, outcome: Ok(()) }
    }

    /// A read of a file that has zeroes beyond its end.
    pub(super) fn read_endless(file: BorrowedFd<'a>, offset: u64, buffer: &'a mut [u8]) -> Self {
        Self { zeroes_beyond: true, ..Self::read(file, offset, vec![IoSliceMut::new(buffer)]) }
    }

    pub(super) fn write(file: BorrowedFd<'a>, offset: u64, buffers: Vec<IoSlice<'a>>) -> Self {
        let left = buffers.iter().map(|buffer| buffer.len() as u64).sum();
        Self { file, offset, left, buffers: Buffers::Write(buffers), zeroes_beyond: false, retries: 0, outcome: Ok(()) }
    }

    /// Carries it out by system calls.
    pub(super) fn run(mut self) -> io::Result<()> {
        let file = self.file;
        while self.left > 0 && self.outcome.is_ok() {
            let moved = match &mut self.buffers {
                Buffers::Read(buffers) => match buffers.as_mut_slice() {
                    [one] => rustix::io::pread(file, &mut **one, self.offset),
                    many => {
                        let count = many.len().min(MAX_BUFFERS);
                        rustix::io::preadv(file, many.split_at_mut(count).0, self.offset)
                    }
                },
                Buffers::Write(buffers) => match buffers.as_slice() {
                    [one] => rustix::io::pwrite(file, one, self.offset),
                    many => rustix::io::pwritev(file, many.split_at(many.len().min(MAX_BUFFERS)).0, self.offset),
                },
            };
            self.settle(moved);
        }
        self.outcome
    }

    /// What remains of it, as an entry of an io_uring. The entry holds pointers into this job: the job has to stay where it is, with
    /// its buffers, until the entry's completion was seen.
    pub(super) fn entry(&mut self) -> squeue::Entry {
        let file = types::Fd(self.file.as_raw_fd());
        // A job has no more than MAX_BUFFERS in one entry, so the count fits.
        let count = |buffers: usize| u32::try_from(buffers.min(MAX_BUFFERS)).unwrap_or(u32::MAX);
        match &mut self.buffers {
            // IoSlice and IoSliceMut are iovecs: the standard library promises it for Unix.
            Buffers::Read(buffers) => {
                opcode::Readv::new(file, buffers.as_mut_ptr().cast(), count(buffers.len())).offset(self.offset).build()
            }
            Buffers::Write(buffers) => {
                opcode::Writev::new(file, buffers.as_ptr().cast(), count(buffers.len())).offset(self.offset).build()
            }
        }
    }

    /// Takes in how an entry completed; says whether the job is over.
    pub(super) fn complete(&mut self, result: i32) -> bool {
        self.settle(usize::try_from(result).map_err(|_| Errno::from_raw_os_error(result.saturating_neg())));
        self.is_over()
    }

    /// Whether nothing of it is left to do.
    pub(super) fn is_over(&self) -> bool {
        self.left == 0 || self.outcome.is_err()
    }

    /// How it went, once it is over; `error` where it was given up before.
    pub(super) fn into_outcome(self, error: Option<&io::Error>) -> io::Result<()> {
        match error {
            Some(error) if self.left > 0 && self.outcome.is_ok() => {
                Err(io::Error::new(error.kind(), error.to_string()))
            }
            _ => self.outcome,
        }
    }

    fn settle(&mut self, moved: Result<usize, Errno>) {
        match moved {
            Ok(0) => self.end(),
            Ok(count) => self.advance(count),
            Err(Errno::INTR | Errno::AGAIN) if self.retries < MAX_RETRIES => self.retries += 1,
            Err(error) => self.outcome = Err(error.into()),
        }
    }

    /// The file moved nothing any more.
    fn end(&mut self) {
        let Self { left, offset, .. } = self;
        let error = match &mut self.buffers {
            Buffers::Read(buffers) if self.zeroes_beyond => {
                buffers.iter_mut().for_each(|buffer| buffer.fill(0));
                *left = 0;
                return;
            }
            Buffers::Read(_) => io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("short read: it ends at {offset}, {left} bytes early: it was cut after it was opened"),
            ),
            Buffers::Write(_) => io::Error::new(
                io::ErrorKind::WriteZero,
                format!("short write: nothing more was taken at {offset}, with {left} bytes left"),
            ),
        };
        self.outcome = Err(error);
    }

    fn advance(&mut self, count: usize) {
        self.offset += count as u64;
        self.left = self.left.saturating_sub(count as u64);
        if self.left == 0 {
            return;
        }
        // Less was moved than asked for: rare, so it may cost a move of the remaining buffers.
        match &mut self.buffers {
            Buffers::Read(buffers) => {
                let mut rest = buffers.as_mut_slice();
                IoSliceMut::advance_slices(&mut rest, count);
                let keep = rest.len();
                buffers.drain(..buffers.len() - keep);
            }
            Buffers::Write(buffers) => {
                let mut rest = buffers.as_mut_slice();
                IoSlice::advance_slices(&mut rest, count);
                let keep = rest.len();
                buffers.drain(..buffers.len() - keep);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn more_buffers_than_one_call_takes_are_written_and_read() {
        let file = tempfile::tempfile().unwrap();
        let data: Vec<u8> = (0..u32::try_from(3 * MAX_BUFFERS).unwrap()).flat_map(u32::to_le_bytes).collect();
        let buffers = data.chunks(4).map(IoSlice::new).collect();
        Job::write(file.as_fd(), 8, buffers).run().unwrap();
        let mut back = vec![0; data.len()];
        let buffers = back.chunks_mut(4).map(IoSliceMut::new).collect();
        Job::read(file.as_fd(), 8, buffers).run().unwrap();
        assert_eq!(back, data);
    }

    #[test]
    fn an_end_that_comes_early_is_an_error_that_says_where() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10).unwrap();
        let mut buffer = [0; 8];
        let error = Job::read(file.as_fd(), 4, vec![IoSliceMut::new(&mut buffer)]).run().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(error.to_string().contains("ends at 10, 2 bytes early"), "{error}");
    }

    #[test]
    fn a_file_without_end_has_zeroes_there() {
        let file = tempfile::tempfile().unwrap();
        rustix::io::pwrite(&file, &[1; 10], 0).unwrap();
        let mut buffer = [7; 8];
        Job::read_endless(file.as_fd(), 4, &mut buffer).run().unwrap();
        assert_eq!(buffer, [1, 1, 1, 1, 1, 1, 0, 0]);
    }

    #[test]
    fn parts_and_interruptions_are_carried_on() {
        let file = tempfile::tempfile().unwrap();
        let (one, two) = ([1; 3], [2; 5]);
        let mut job = Job::write(file.as_fd(), 100, vec![IoSlice::new(&one), IoSlice::new(&two)]);
        assert!(!job.complete(-Errno::INTR.raw_os_error()));
        assert!(!job.complete(4));
        assert_eq!((job.offset, job.left), (104, 4));
        let Buffers::Write(left) = &job.buffers else { unreachable!("it is a write") };
        assert_eq!((left.len(), left[0].len()), (1, 4));
        assert!(job.complete(4));
        assert!(job.into_outcome(None).is_ok());
        let mut job = Job::write(file.as_fd(), 0, vec![IoSlice::new(&one)]);
        assert!(job.complete(-Errno::IO.raw_os_error()));
        assert_eq!(job.into_outcome(None).unwrap_err().raw_os_error(), Some(Errno::IO.raw_os_error()));
    }
}
