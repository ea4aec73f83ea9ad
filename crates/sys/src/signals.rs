//! Signals passed on to a child, so that who stops us stops it, and it may end in its own way.
//!
//! Handlers are there before the child is: what arrives meanwhile is kept and passed on as soon as there is somebody to pass it to.

use std::os::raw::c_int;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

use rustix::process::{Pid, Signal};

const FORWARDED: [c_int; 7] =
    [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2, libc::SIGWINCH];

/// Whether somebody forwards.
static BUSY: AtomicBool = AtomicBool::new(false);
/// Whom signals go to; 0 while there is nobody.
static TARGET: AtomicI32 = AtomicI32::new(0);
/// The signals that came while there was nobody: bit `n` for signal `n`.
static PENDING: AtomicU64 = AtomicU64::new(0);
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
    /// Starts keeping signals for a child that is about to be started.
    ///
    /// # Errors
    /// [`Busy`]: one child at a time.
    pub fn prepare(terminal: Terminal) -> Result<Self, Busy> {
        if BUSY.swap(true, Ordering::SeqCst) {
            return Err(Busy);
        }
        PENDING.store(0, Ordering::SeqCst);
        FROM_KERNEL.store(terminal == Terminal::Ours, Ordering::SeqCst);
        let previous = FORWARDED.into_iter().filter_map(|signal| Some((signal, install(signal)?))).collect();
        Ok(Self { previous })
    }

    /// Passes on to `child`, which the caller has not waited for yet, what was kept and what comes.
    pub fn to(&self, child: Pid) {
        TARGET.store(child.as_raw_nonzero().get(), Ordering::SeqCst);
        deliver();
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
        BUSY.store(false, Ordering::SeqCst);
    }
}

/// Sends a signal to the child that signals are passed on to; whether there is one.
pub fn send_to_child(signal: Signal) -> bool {
    let target = Pid::from_raw(TARGET.load(Ordering::SeqCst));
    target.is_some_and(|child| rustix::process::kill_process(child, signal).is_ok())
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
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
    #[expect(unsafe_code, reason = "a signal handler gets a raw pointer")]
    let from_kernel = unsafe { (*info).si_code > 0 };
    if from_kernel && !FROM_KERNEL.load(Ordering::SeqCst) {
        return;
    }
    PENDING.fetch_or(1 << signal, Ordering::SeqCst);
    deliver();
}

/// Sends what is pending, if there is somebody to send it to. Whoever takes a signal out of the set sends it, so none is sent twice;
/// and it is called after each change of the set or of the target, so none is left. Async-signal-safe.
fn deliver() {
    let target = TARGET.load(Ordering::SeqCst);
    if target <= 0 {
        return;
    }
    let pending = PENDING.swap(0, Ordering::SeqCst);
    for signal in FORWARDED.into_iter().filter(|signal| pending & (1 << signal) != 0) {
        // SAFETY: kill(2) touches no memory of ours; errno is this thread's own, and is put back for the code that was interrupted.
        #[expect(unsafe_code, reason = "rustix does not promise to be async-signal-safe")]
        unsafe {
            let errno = libc::__errno_location();
            let saved = *errno;
            libc::kill(target, signal);
            *errno = saved;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_signal_that_came_before_the_child_reaches_it() {
        let forward = Forward::prepare(Terminal::Shared).unwrap();
        assert!(Forward::prepare(Terminal::Shared).is_err());
        rustix::process::kill_process(rustix::process::getpid(), Signal::USR1).unwrap();
        while PENDING.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        forward.to(Pid::from_child(&child));
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGUSR1));
        drop(forward);
        assert!(!send_to_child(Signal::TERM), "there is no child any more");
        let forward = Forward::prepare(Terminal::Shared).unwrap();
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        forward.to(Pid::from_child(&child));
        assert!(send_to_child(Signal::KILL));
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        drop(forward);
        assert!(Forward::prepare(Terminal::Ours).is_ok());
    }
}
