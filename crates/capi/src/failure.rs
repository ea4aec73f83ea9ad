//! What went wrong: a number for programs, words for people.

use std::{
    cell::RefCell,
    ffi::{CString, c_char},
    panic::{AssertUnwindSafe, catch_unwind},
};

use nacre_guest::{config::ConfigError, images::PullError, lazy::LazyError, service::ServiceError, store::StoreError};
use nacre_lazy::{artifact::ArtifactError, files::FileError, frames::FrameError, image::OpenError};
use nacre_oci::source::TransportError;
use rustix::io::Errno;

/// Why a call failed.
#[derive(Debug)]
pub(crate) struct Failure {
    errno: Errno,
    text: String,
}

pub(crate) type Outcome<T> = Result<T, Failure>;

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

impl Failure {
    pub(crate) fn new(errno: Errno, text: impl Into<String>) -> Self {
        Self { errno, text: text.into() }
    }

    /// An argument that is none.
    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self::new(Errno::INVAL, text)
    }

    /// With what it is about before it.
    pub(crate) fn about(self, what: &[u8]) -> Self {
        let what: String = String::from_utf8_lossy(what).chars().take(300).collect();
        Self { text: format!("{what}: {}", self.text), ..self }
    }
}

/// Runs a call for C: gives what it gives, or the negative number of its failure, whose words are kept for this thread.
pub(crate) fn guard<N: From<i16>>(call: impl FnOnce() -> Outcome<N>) -> N {
    // What a call that panicked leaves behind is behind locks, whose poison is looked through, and was verified before it was kept.
    let outcome = catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| {
        Err(Failure::new(Errno::IO, "a fault of this library (it panicked; what it said is on standard error)"))
    });
    outcome.unwrap_or_else(|failure| {
        let text: Vec<u8> = failure.text.bytes().filter(|byte| *byte != 0).collect();
        LAST.with_borrow_mut(|last| *last = CString::new(text).unwrap_or_default());
        N::from(-i16::try_from(failure.errno.raw_os_error()).unwrap_or(i16::MAX))
    })
}

/// The words of this thread's last failure.
pub(crate) fn last() -> *const c_char {
    LAST.with_borrow(|last| last.as_ptr())
}

impl From<ServiceError> for Failure {
    fn from(error: ServiceError) -> Self {
        let errno = match &error {
            ServiceError::Pull(error) => pull(error),
            ServiceError::Lazy(error) => lazy(error),
            ServiceError::Transport(error) => transport(error),
            ServiceError::Store(error) => store(error),
            ServiceError::File { source, .. } => Errno::from_io_error(source).unwrap_or(Errno::IO),
            ServiceError::Crypt(_) | ServiceError::Key(_) | ServiceError::Broker(_) | ServiceError::Attester(_) => {
                Errno::ACCESS
            }
            ServiceError::Compose(_) | ServiceError::Mount(_) | ServiceError::Event(_) => Errno::IO,
            ServiceError::Config(_)
            | ServiceError::Policy(_)
            | ServiceError::InitData(_)
            | ServiceError::Offline(_)
            | ServiceError::Uri(_)
            | ServiceError::Platform(_)
            | ServiceError::Reference(_) => Errno::INVAL,
        };
        Self::new(errno, words(&error))
    }
}

impl From<LazyError> for Failure {
    fn from(error: LazyError) -> Self {
        Self::new(lazy(&error), words(&error))
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::new(store(&error), words(&error))
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::invalid(words(&error))
    }
}

impl From<FileError> for Failure {
    fn from(error: FileError) -> Self {
        let errno = match &error {
            FileError::NotFound => Errno::NOENT,
            FileError::NotDirectory => Errno::NOTDIR,
            FileError::IsDirectory => Errno::ISDIR,
            FileError::Kind(_) => Errno::INVAL,
            FileError::Links => Errno::LOOP,
            FileError::Long => Errno::NAMETOOLONG,
            FileError::NoAttribute => Errno::NODATA,
            FileError::Tree(_) | FileError::Read(_) => Errno::IO,
        };
        Self::new(errno, words(&error))
    }
}

fn pull(error: &PullError) -> Errno {
    match error {
        PullError::Transport(error) => transport(error),
        PullError::Store(error) => store(error),
        PullError::Event(_) => Errno::IO,
        PullError::Trust(_) | PullError::Key { .. } | PullError::LazyKey(_) => Errno::ACCESS,
        PullError::Reference(_) | PullError::Lazy(_) => Errno::INVAL,
        PullError::Manifest(_)
        | PullError::IndexDepth { .. }
        | PullError::TooManyLayers { .. }
        | PullError::Layer { .. }
        | PullError::Stack { .. } => Errno::BADMSG,
    }
}

fn lazy(error: &LazyError) -> Errno {
    match error {
        LazyError::Pull(error) => pull(error),
        LazyError::Artifact(ArtifactError::Key(_)) => Errno::ACCESS,
        LazyError::Artifact(ArtifactError::Kind { .. }) => Errno::INVAL,
        LazyError::Io { source, .. } | LazyError::Open(OpenError::Local(source)) => {
            Errno::from_io_error(source).unwrap_or(Errno::IO)
        }
        LazyError::Open(OpenError::Frames(FrameError::Io(_))) => Errno::IO,
        LazyError::Fuse(_) | LazyError::Erofs(_) | LazyError::Grant(_) => Errno::IO,
        LazyError::NoIndex { tried, .. } if tried.is_empty() => Errno::INVAL,
        LazyError::NoIndex { .. }
        | LazyError::Index(_)
        | LazyError::Artifact(_)
        | LazyError::Open(_)
        | LazyError::Check(_)
        | LazyError::Device { .. }
        | LazyError::Config(_) => Errno::BADMSG,
    }
}

fn transport(error: &TransportError) -> Errno {
    match error {
        TransportError::NotFound { .. } => Errno::NOENT,
        TransportError::Denied { .. } | TransportError::Blocked { .. } => Errno::ACCESS,
        TransportError::Config { .. } | TransportError::Unsupported { .. } => Errno::INVAL,
        _ => Errno::IO,
    }
}

fn store(error: &StoreError) -> Errno {
    match error {
        StoreError::Io { source, .. } => Errno::from_io_error(source).unwrap_or(Errno::IO),
        StoreError::InMemory { .. } => Errno::INVAL,
        _ => Errno::IO,
    }
}

/// An error with its causes, each once.
fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_failure_of_the_call_and_words_have_no_zeroes() {
        assert_eq!(guard(|| Ok(7i32)), 7);
        assert_eq!(guard::<isize>(|| unreachable!("this is a test")), -5);
        assert_eq!(guard::<i32>(|| Err(Failure::invalid("a\0b").about(b"\xff"))), -22);
        let words = LAST.with_borrow(|last| last.clone());
        assert_eq!(words.as_c_str().to_bytes(), "\u{fffd}: ab".as_bytes());
        let other = std::thread::spawn(|| LAST.with_borrow(|last| last.clone())).join().unwrap();
        assert_eq!(other.as_c_str(), c"");
    }
}
