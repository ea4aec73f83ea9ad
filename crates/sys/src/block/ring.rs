//! Many transfers in flight at once, by io_uring.
//!
//! Every thread has a ring of its own, so calls of several threads do not wait for each other, and the kernel delivers completions only when
//! their one reader asks for them: two writes and the wait for both cost little more than one write. What is in flight borrows its caller's
//! memory: a call does not return, and does not unwind, before the kernel has let go of all of it.

use std::{cell::Cell, io, thread, time::Duration};

use io_uring::{EnterFlags, IoUring};

use super::job::Job;

/// Transfers that one call has in flight; more wait their turn. Disks take no more at once either.
const DEPTH: u32 = 128;

thread_local! {
    /// The ring of this thread, when no call uses it.
    static RING: Cell<Option<IoUring>> = const { Cell::new(None) };
}

/// Says that there is io_uring here.
pub(super) struct Rings(());

impl Rings {
    /// Makes this thread's ring.
    ///
    /// # Errors
    /// The kernel has no io_uring, or this process may not use it (containers often forbid it).
    pub(super) fn new() -> io::Result<Self> {
        let ring = RING.take().map_or_else(build, Ok)?;
        RING.set(Some(ring));
        Ok(Self(()))
    }

    /// Carries out all `jobs`, each with an outcome of its own.
    ///
    /// # Errors
    /// The ring failed as a whole: jobs that are not over were not carried out.
    pub(super) fn run(&self, jobs: &mut [Job<'_>]) -> io::Result<()> {
        let mut ring = RING.take().map_or_else(build, Ok)?;
        // A ring that failed is dropped: entries that the kernel has not taken from it go with it.
        Flight { ring: &mut ring, flying: 0 }.run(jobs)?;
        RING.set(Some(ring));
        Ok(())
    }
}

fn build() -> io::Result<IoUring> {
    let old = |error: &io::Error| error.kind() == io::ErrorKind::InvalidInput;
    // A ring has one thread, which looks at completions only when it waits for them (Linux 6.1; from 5.19 on at least nobody has to be
    // interrupted for them; older ones go without).
    match IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(DEPTH) {
        Err(error) if old(&error) => match IoUring::builder().setup_coop_taskrun().build(DEPTH) {
            Err(error) if old(&error) => IoUring::new(DEPTH),
            result => result,
        },
        result => result,
    }
}

/// Entries that are in the ring; none are when this is gone.
struct Flight<'r> {
    ring: &'r mut IoUring,
    flying: usize,
}

impl Flight<'_> {
    fn run(mut self, jobs: &mut [Job<'_>]) -> io::Result<()> {
        let mut waiting: Vec<usize> = (0..jobs.len()).rev().collect();
        loop {
            self.push(jobs, &mut waiting);
            if self.flying == 0 {
                return Ok(());
            }
            // With more to come, come back to push it when half is done.
            let want = if waiting.is_empty() { self.flying } else { self.flying.div_ceil(2) };
            match self.ring.submit_and_wait(want) {
                Ok(_) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
                Err(error) => return Err(error),
            }
            for completion in self.ring.completion() {
                self.flying = self.flying.saturating_sub(1);
                let index = usize::try_from(completion.user_data()).unwrap_or(usize::MAX);
                if jobs.get_mut(index).is_some_and(|job| !job.complete(completion.result())) {
                    waiting.push(index); // never more than there are jobs, so this does not allocate
                }
            }
        }
    }

    fn push(&mut self, jobs: &mut [Job<'_>], waiting: &mut Vec<usize>) {
        let mut queue = self.ring.submission();
        while self.flying < DEPTH as usize {
            let Some(index) = waiting.pop() else { return };
            let Some(job) = jobs.get_mut(index).filter(|job| !job.is_over()) else { continue };
            let entry = job.entry().user_data(index as u64);
            // SAFETY: the entry points to the job's list of buffers and by it to the buffers. All of them are borrowed by the jobs,
            // which the caller lends for longer than this Flight lives; the job is not touched until its completion, and a Flight
            // ends, by return or by unwinding, only when no entry is with the kernel (see Drop). The file is borrowed as well.
            #[expect(unsafe_code, reason = "what io_uring works on is only known by address")]
            let pushed = unsafe { queue.push(&entry) };
            if pushed.is_err() {
                waiting.push(index);
                return;
            }
            self.flying += 1;
        }
    }
}

impl Drop for Flight<'_> {
    /// Waits for what the kernel still works on. After a normal end that is nothing.
    fn drop(&mut self) {
        loop {
            let done = self.ring.completion().count();
            self.flying = self.flying.saturating_sub(done);
            // What is left in the submission queue was never taken.
            if self.flying <= self.ring.submission().len() {
                return;
            }
            // SAFETY: nothing is submitted and no argument is passed: this only waits for a completion.
            #[expect(unsafe_code, reason = "the plain call by which nothing is submitted")]
            let waited = unsafe { self.ring.submitter().enter::<()>(0, 1, EnterFlags::GETEVENTS.bits(), None) };
            if waited.is_err() {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{IoSlice, IoSliceMut},
        os::fd::AsFd as _,
    };

    use super::*;

    #[test]
    fn more_jobs_than_fit_are_carried_out_and_each_has_its_outcome() {
        let Ok(rings) = Rings::new() else {
            nacre_testkit::skip("io_uring is not available here");
            return;
        };
        let file = tempfile::tempfile().unwrap();
        let count = 3 * u64::from(DEPTH) + 1;
        let data: Vec<[u8; 8]> = (0..count).map(u64::to_le_bytes).collect();
        let mut writes: Vec<Job<'_>> =
            (0..).zip(&data).map(|(at, value)| Job::write(file.as_fd(), at * 8, vec![IoSlice::new(value)])).collect();
        rings.run(&mut writes).unwrap();
        assert!(writes.into_iter().all(|job| job.into_outcome(None).is_ok()));

        let mut back = vec![[0; 8]; data.len() + 1];
        let mut reads: Vec<Job<'_>> = (0..)
            .zip(&mut back)
            .map(|(at, value)| Job::read(file.as_fd(), at * 8, vec![IoSliceMut::new(value)]))
            .collect();
        rings.run(&mut reads).unwrap();
        let outcomes: Vec<_> = reads.into_iter().map(|job| job.into_outcome(None)).collect();
        let (last, others) = outcomes.split_last().unwrap();
        assert!(others.iter().all(Result::is_ok));
        assert_eq!(last.as_ref().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(&back[..data.len()], &data);
    }

    #[test]
    fn a_file_that_takes_no_writes_fails_each_of_them() {
        let Ok(rings) = Rings::new() else {
            nacre_testkit::skip("io_uring is not available here");
            return;
        };
        let file = std::fs::File::open("/dev/null").unwrap();
        let mut jobs = vec![
            Job::write(file.as_fd(), 0, vec![IoSlice::new(&[1])]),
            Job::write(file.as_fd(), 1, vec![IoSlice::new(&[2])]),
        ];
        rings.run(&mut jobs).unwrap();
        for job in jobs {
            assert_eq!(job.into_outcome(None).unwrap_err().raw_os_error(), Some(libc::EBADF));
        }
    }
}
