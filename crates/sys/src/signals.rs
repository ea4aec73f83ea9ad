//! Signals passed on to a child, so that who stops us stops it, and it may end in its own way.

use std::os::raw::c_int;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use rustix::process::Pid;

const FORWARDED: [c_int; 7] =
    [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2, libc::SIGWINCH];

/// Whom signals go to; 0 for nobody.
static TARGET: AtomicI32 = AtomicI32::new(0);
/// Whether those that the kernel sends (a terminal's Ctrl-C) are passed on too.
static FROM_KERNEL: AtomicBool = AtomicBool::new(false);

/// Who else gets the signals of the terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Terminal {
    /// The child is in our process group: the terminal signals it itself.
    Shared,
    /// The child is in a session of its own: it hears only what is passed on.
    Ours,
}

/// While it lives, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2 and SIGWINCH are passed on to one child instead of ending
/// this process.
#[derive(Debug)]
pub struct Forward {
    previous: Vec<(c_int, libc::sigaction)>,
}

/// Signals are being passed on to another child already.
#[derive(Debug, thiserror::Error)]
#[error("another child in the foreground is being run already")]
pub struct Busy;

impl Forward {
    /// Starts passing signals on to `child`, which the caller has not waited for yet.
    ///
    /// # Errors
    /// [`Busy`]: one child at a time.
    pub fn to(child: Pid, terminal: Terminal) -> Result<Self, Busy> {
        let pid = child.as_raw_nonzero().get();
        TARGET.compare_exchange(0, pid, Ordering::SeqCst, Ordering::SeqCst).map_err(|_| Busy)?;
        FROM_KERNEL.store(terminal == Terminal::Ours, Ordering::SeqCst);
        let previous = FORWARDED.into_iter().filter_map(|signal| Some((signal, install(signal)?))).collect();
        Ok(Self { previous })
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        TARGET.store(0, Ordering::SeqCst);
        for (signal, previous) in &self.previous {
            // SAFETY: `previous` was filled in by sigaction for this very signal, and no old action is asked for.
            #[expect(unsafe_code, reason = "rustix leaves signal handlers to libc")]
            unsafe {
                libc::sigaction(*signal, previous, std::ptr::null_mut());
            }
        }
    }
}

fn install(signal: c_int) -> Option<libc::sigaction> {
    // SAFETY: sigaction is a C struct of integers, a signal set and a function address, for all of which zero is a valid value. The
    // handler has the type that SA_SIGINFO asks for, is never unloaded, and is async-signal-safe (see there).
    #[expect(unsafe_code, reason = "rustix leaves signal handlers to libc")]
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let mut previous: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as extern "C" fn(c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        (libc::sigaction(signal, &action, &mut previous) == 0).then_some(previous)
    }
}

/// Runs in a signal's context: only atomics and kill(2), and errno as it was.
extern "C" fn handler(signal: c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler, errno is this thread's own, and kill(2) is
    // async-signal-safe.
    #[expect(unsafe_code, reason = "a signal handler can do nothing but call the kernel")]
    unsafe {
        let from_kernel = (*info).si_code > 0;
        let target = TARGET.load(Ordering::SeqCst);
        if target > 0 && (!from_kernel || FROM_KERNEL.load(Ordering::SeqCst)) {
            let errno = libc::__errno_location();
            let saved = *errno;
            libc::kill(target, signal);
            *errno = saved;
        }
    }
}
