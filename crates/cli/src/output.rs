//! What the program says: data on standard output, everything else on standard error, and exit codes that scripts can act on.

use std::io::{self, Write as _};

use serde::Serialize;

/// Why the program ended, as a number (see `nacre help`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// None of the others.
    Other = 1,
    /// The command line or the configuration says what cannot be.
    Usage = 2,
    /// Policy, signature, integrity or attestation: it is not trusted.
    NotTrusted = 3,
    /// There is no such thing.
    NotFound = 4,
    /// Disk or network.
    Io = 5,
    /// In use, or changed by another.
    Conflict = 6,
}

impl Exit {
    /// As another process said it.
    pub(crate) fn of_code(code: u8) -> Self {
        let all = [Self::Usage, Self::NotTrusted, Self::NotFound, Self::Io, Self::Conflict];
        all.into_iter().find(|exit| *exit as u8 == code).unwrap_or(Self::Other)
    }
}

/// Writes a line of data. A closed pipe ends the program quietly, as for any filter.
pub(crate) fn line(text: impl std::fmt::Display) -> io::Result<()> {
    match writeln!(io::stdout().lock(), "{text}") {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result,
    }
}

/// Writes data as JSON.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    Ok(line(serde_json::to_string_pretty(value)?)?)
}

/// Writes a table with aligned columns.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> io::Result<()> {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let head: Vec<String> = head.iter().map(|cell| (*cell).to_owned()).collect();
    for row in std::iter::once(&head).chain(rows) {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        line(cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

/// Writes an error with all its causes, each once.
#[expect(clippy::print_stderr, reason = "errors go to standard error, and this is where they do")]
pub(crate) fn error(error: &anyhow::Error) {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        // Many messages already end with their source's.
        if !text.ends_with(&cause) {
            text.push_str(if text.is_empty() { "" } else { ": " });
            text.push_str(&cause);
        }
    }
    eprintln!("nacre: {text}");
}
