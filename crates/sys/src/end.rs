//! How a daemon is ended: it waits for the signals that ask for it.

/// SIGINT and SIGTERM, held back from ending the process until somebody waits for them: a daemon ends in its own way.
#[derive(Debug)]
pub struct EndSignals {
    set: libc::sigset_t,
}

impl EndSignals {
    /// Holds them back in this thread and in those that it starts from now on: to be called before there are others.
    ///
    /// # Errors
    /// The system's answer.
    pub fn hold() -> std::io::Result<Self> {
        // SAFETY: a signal set is plain data, which sigemptyset initialises before anything reads it.
        #[expect(unsafe_code, reason = "rustix leaves signal masks to libc")]
        let (code, set) = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, libc::SIGINT);
            libc::sigaddset(&mut set, libc::SIGTERM);
            (libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()), set)
        };
        if code == 0 { Ok(Self { set }) } else { Err(std::io::Error::from_raw_os_error(code)) }
    }

    /// Waits for one of them, so long; whether one came.
    ///
    /// # Errors
    /// The system's answer.
    pub fn wait_for(&self, time: std::time::Duration) -> std::io::Result<bool> {
        let time = libc::timespec {
            tv_sec: libc::time_t::try_from(time.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: time.subsec_nanos().into(),
        };
        // SAFETY: both pointers are to live values of the types that sigtimedwait takes; it is told that nobody wants to know more.
        #[expect(unsafe_code, reason = "rustix leaves signal masks to libc")]
        let signal = unsafe { libc::sigtimedwait(&self.set, std::ptr::null_mut(), &time) };
        if signal >= 0 {
            return Ok(true);
        }
        match std::io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => Ok(false),
            error => Err(error),
        }
    }

    /// Waits for one of them.
    ///
    /// # Errors
    /// The system's answer.
    pub fn wait(&self) -> std::io::Result<()> {
        let mut signal = 0;
        // SAFETY: both pointers are to live values of the types that sigwait takes.
        #[expect(unsafe_code, reason = "rustix leaves signal masks to libc")]
        let code = unsafe { libc::sigwait(&self.set, &mut signal) };
        if code == 0 { Ok(()) } else { Err(std::io::Error::from_raw_os_error(code)) }
    }
}
