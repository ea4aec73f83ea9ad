//! What a process that serves a block device tells the kernel about its memory.
//!
//! The kernel frees memory by writing dirty pages to block devices. Where such a device is served by a process, the process must not
//! wait for that: its allocation would wait for the kernel to free memory, and the kernel for the process to take the page. Two things
//! prevent it. [`become_io_flusher`] makes allocations on behalf of a thread free clean memory only, never by starting or awaiting
//! writes, and exempts the thread from the throttling of whoever dirties pages. And memory that was swapped out cannot be brought back
//! by whom it is swapped out to: so a served device is no place for swap. Locking the process into memory (mlockall) would not replace
//! the first, since new memory is what the deadlock is about, and takes memory that a guest does not have to spare.

use std::io;

/// Of linux/prctl.h; libc has not got them.
const PR_SET_IO_FLUSHER: i32 = 57;
const PR_GET_IO_FLUSHER: i32 = 58;

/// Marks the calling thread, and all threads that it starts from now on, as those that write out for others: `PR_SET_IO_FLUSHER`.
///
/// To be called before the threads of a store and of a front end are started.
///
/// # Errors
/// The process lacks CAP_SYS_RESOURCE, or the kernel is older than 5.6.
pub fn become_io_flusher() -> io::Result<()> {
    // SAFETY: prctl with this option takes numbers only, and changes nothing but flags of the calling thread.
    #[expect(unsafe_code, reason = "rustix does not offer PR_SET_IO_FLUSHER")]
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1_u64, 0_u64, 0_u64, 0_u64) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether the calling thread is marked.
pub fn is_io_flusher() -> bool {
    // SAFETY: as above; this one only asks.
    #[expect(unsafe_code, reason = "rustix does not offer PR_GET_IO_FLUSHER")]
    let result = unsafe { libc::prctl(PR_GET_IO_FLUSHER, 0_u64, 0_u64, 0_u64, 0_u64) };
    result == 1
}

/// Lets all threads of the process share one heap: glibc gives each processor's threads heaps of their own, which keep what is freed, and
/// a daemon whose memory is bounded wants it back. To be called before threads are started; elsewhere than on glibc it does nothing.
pub fn share_one_heap() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: mallopt takes numbers only; one that it does not like it refuses.
        #[expect(unsafe_code, reason = "there is no safe interface to glibc's settings")]
        let _ = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_inherit_the_mark_and_need_the_capability_for_it() {
        let capable = rustix::thread::capabilities(None)
            .is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::SYS_RESOURCE));
        let marked = std::thread::spawn(|| {
            assert!(!is_io_flusher());
            become_io_flusher().map(|()| std::thread::spawn(is_io_flusher).join().unwrap())
        });
        match marked.join().unwrap() {
            Ok(inherited) => assert!(capable && inherited),
            Err(error) => assert!(!capable && error.kind() == io::ErrorKind::PermissionDenied, "{error}"),
        }
        assert!(!is_io_flusher(), "other threads stay as they are");
    }
}
