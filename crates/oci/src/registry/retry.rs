//! Which failures may pass, and how long to wait before the next attempt.

use std::{io, time::Duration};

use super::config::ClientConfig;
use crate::source::TransportError;

/// How one attempt failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The peer was not reached, stalled, or cut the connection. May pass.
    Network(String),
    /// The peer said that it cannot now (408, 429, 5xx), and maybe when it can. May pass.
    Busy { reason: String, retry_after: Option<Duration> },
    /// The peer answered something that it must not.
    Protocol(String),
    /// There is no such thing.
    NotFound,
    /// The peer wants other credentials.
    Denied(String),
    /// The answer is larger than it may be.
    TooLarge(u64),
    /// What was to be sent could not be read.
    Content(io::Error),
    /// An error that is already complete.
    Complete(TransportError),
}

impl Failure {
    /// Whether another attempt may fare better.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(self, Self::Network(_) | Self::Busy { .. })
    }

    /// What happened, for people.
    pub(crate) fn reason(&self) -> String {
        match self {
            Self::Network(reason) | Self::Busy { reason, .. } | Self::Protocol(reason) | Self::Denied(reason) => {
                reason.clone()
            }
            Self::NotFound => "not found".into(),
            Self::TooLarge(limit) => format!("larger than {limit} bytes"),
            Self::Content(error) => error.to_string(),
            Self::Complete(error) => error.to_string(),
        }
    }

    /// The error for the caller.
    pub(crate) fn into_error(self, what: &str, place: &str, attempts: u32) -> TransportError {
        let (what, place) = (what.to_owned(), place.to_owned());
        match self {
            Self::Network(reason) | Self::Busy { reason, .. } => {
                TransportError::Network { what, place, attempts, reason }
            }
            Self::Protocol(reason) => TransportError::Protocol { what, place, reason },
            Self::NotFound => TransportError::NotFound { what, place },
            Self::Denied(reason) => TransportError::Denied { what, place, reason },
            Self::TooLarge(limit) => TransportError::TooLarge { what, place, limit },
            Self::Content(source) => match source.downcast::<TransportError>() {
                Ok(error) => error,
                Err(source) => TransportError::Io { what: "reading what is uploaded", path: what.into(), source },
            },
            Self::Complete(error) => error,
        }
    }
}

impl From<TransportError> for Failure {
    fn from(error: TransportError) -> Self {
        Self::Complete(error)
    }
}

/// The pauses of one operation.
pub(crate) struct Backoff {
    next: Duration,
    longest: Duration,
    longest_retry_after: Duration,
    left: u32,
    made: u32,
}

impl Backoff {
    pub(crate) fn new(config: &ClientConfig, retries: u32) -> Self {
        Self {
            next: config.first_backoff,
            longest: config.longest_backoff,
            longest_retry_after: config.longest_retry_after,
            left: retries.min(20),
            made: 0,
        }
    }

    /// How many attempts were made, the running one included.
    pub(crate) fn attempts(&self) -> u32 {
        self.made + 1
    }

    /// The pause before the next attempt after `failure`; `None` where there is to be none.
    pub(crate) fn after(&mut self, failure: &Failure) -> Option<Duration> {
        let asked = match failure {
            Failure::Network(_) => None,
            Failure::Busy { retry_after, .. } => *retry_after,
            _ => return None,
        };
        if self.left == 0 || asked.is_some_and(|asked| asked > self.longest_retry_after) {
            return None;
        }
        self.left -= 1;
        self.made += 1;
        let pause = jitter(self.next);
        self.next = self.next.saturating_mul(2).min(self.longest);
        Some(asked.map_or(pause, |asked| asked.max(pause)))
    }
}

/// Between a half and the whole of `pause`, so that many clients of a registry that came back do not return together.
fn jitter(pause: Duration) -> Duration {
    use rand_core::RngCore as _;
    let half = pause / 2;
    half + half.mul_f64(f64::from(rand_core::OsRng.next_u32()) / f64::from(u32::MAX))
}

/// Reads `Retry-After`: seconds, or an HTTP date.
pub fn parse_retry_after(value: &str) -> Option<Duration> {
    let value = value.trim();
    if !value.is_empty() && value.len() <= 10 && value.bytes().all(|b| b.is_ascii_digit()) {
        return value.parse().ok().map(Duration::from_secs);
    }
    let date = value.strip_suffix("GMT").map(|date| format!("{date}+0000"))?;
    let when = time::OffsetDateTime::parse(&date, &time::format_description::well_known::Rfc2822).ok()?;
    Duration::try_from(when - time::OffsetDateTime::now_utc()).ok().or(Some(Duration::ZERO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        assert_eq!(parse_retry_after(" 7 "), Some(Duration::from_secs(7)));
        assert_eq!(parse_retry_after("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        let later = parse_retry_after("Fri, 01 Jan 2100 00:00:00 GMT").unwrap();
        assert!(later > Duration::from_secs(86_400));
        for text in ["", "-1", "1.5", "soon", "99999999999", "GMT", "Sun, 99 Nov 1994 08:49:37 GMT"] {
            assert_eq!(parse_retry_after(text), None, "{text}");
        }
    }

    #[test]
    fn pauses_double_up_to_a_bound_and_end() {
        let config = ClientConfig { longest_backoff: Duration::from_secs(1), ..ClientConfig::default() };
        let mut backoff = Backoff::new(&config, 4);
        let failure = Failure::Network("cut".into());
        let mut bound = config.first_backoff;
        for attempt in 1..=4 {
            assert_eq!(backoff.attempts(), attempt);
            let pause = backoff.after(&failure).unwrap();
            assert!(pause >= bound / 2 && pause <= bound, "{pause:?} {bound:?}");
            bound = (bound * 2).min(config.longest_backoff);
        }
        assert_eq!(backoff.after(&failure), None);
    }

    #[test]
    fn what_will_not_pass_and_absurd_waits_end_at_once() {
        let config = ClientConfig::default();
        let mut backoff = Backoff::new(&config, 4);
        for failure in
            [Failure::NotFound, Failure::Denied(String::new()), Failure::Protocol(String::new()), Failure::TooLarge(1)]
        {
            assert_eq!(backoff.after(&failure), None);
        }
        let busy = |seconds| Failure::Busy { reason: String::new(), retry_after: Some(Duration::from_secs(seconds)) };
        assert_eq!(backoff.after(&busy(3600)), None);
        assert_eq!(backoff.after(&busy(9)), Some(Duration::from_secs(9)));
    }
}
