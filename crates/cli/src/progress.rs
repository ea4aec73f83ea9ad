//! Progress for people, on stderr: a bar a task on a terminal, a line when a task starts and ends elsewhere, nothing when quiet.

use std::{
    io::IsTerminal as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use nacre_core::{NoProgress, Progress, Task};

/// How much a person wants to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verbosity {
    /// Errors only.
    Quiet,
    /// Bars or lines.
    Normal,
}

/// The progress display for this standard error.
pub(crate) fn display(verbosity: Verbosity) -> Arc<dyn Progress> {
    match verbosity {
        Verbosity::Quiet => Arc::new(NoProgress),
        Verbosity::Normal if std::io::stderr().is_terminal() => Arc::new(Bars(MultiProgress::new())),
        Verbosity::Normal => Arc::new(Lines),
    }
}

struct Bars(MultiProgress);

impl Progress for Bars {
    fn begin(&self, name: &str, total: Option<u64>) -> Box<dyn Task> {
        let bar = match total {
            Some(total) => ProgressBar::new(total)
                .with_style(style("{prefix:24} {bar:28} {bytes:>11}/{total_bytes:11} {bytes_per_sec:>13} {msg}")),
            None => ProgressBar::new_spinner().with_style(style("{prefix:24} {spinner} {bytes} {msg}")),
        };
        let bar = self.0.add(bar.with_prefix(name.to_owned()));
        Box::new(Bar { bar, ended: AtomicBool::new(false) })
    }

    fn note(&self, message: &str) {
        // Only the terminal's own refusal can fail here, and then there is nobody to tell.
        let _ = self.0.println(message);
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

struct Bar {
    bar: ProgressBar,
    ended: AtomicBool,
}

impl Task for Bar {
    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn waiting(&self, why: &str, delay: Duration) {
        self.bar.set_message(format!("{why}; trying again in {:.1} s", delay.as_secs_f32()));
    }

    fn done(&self, outcome: &str) {
        self.ended.store(true, Ordering::Relaxed);
        self.bar.finish_with_message(outcome.to_owned());
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if !self.ended.load(Ordering::Relaxed) {
            self.bar.abandon_with_message("stopped");
        }
    }
}

struct Lines;

impl Progress for Lines {
    fn begin(&self, name: &str, total: Option<u64>) -> Box<dyn Task> {
        match total {
            Some(total) => line(&format!("{name}: {} …", size(total))),
            None => line(&format!("{name} …")),
        }
        Box::new(Line(name.to_owned()))
    }

    fn note(&self, message: &str) {
        line(message);
    }
}

struct Line(String);

impl Task for Line {
    fn advance(&self, _bytes: u64) {}

    fn waiting(&self, why: &str, delay: Duration) {
        line(&format!("{}: {why}; trying again in {:.1} s", self.0, delay.as_secs_f32()));
    }

    fn done(&self, outcome: &str) {
        line(&format!("{}: {outcome}", self.0));
    }
}

#[expect(clippy::print_stderr, reason = "progress goes to standard error, and this is where it does")]
fn line(text: &str) {
    eprintln!("{text}");
}

/// A size for people: `1.5 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut value = bytes as f64;
    let mut units = ["B", "KiB", "MiB", "GiB"].iter();
    let mut unit = units.next();
    while value >= 1024.0
        && let Some(next) = units.next()
    {
        value /= 1024.0;
        unit = Some(next);
    }
    let unit = unit.unwrap_or(&"TiB");
    if *unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_read_well() {
        for (bytes, text) in
            [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (5 << 40, "5120.0 GiB")]
        {
            assert_eq!(super::size(bytes), text);
        }
    }
}
