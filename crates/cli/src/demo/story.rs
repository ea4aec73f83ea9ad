//! What the demo tells: numbered steps, facts below them, a verdict for each attack.

use std::{fmt::Display, io, io::IsTerminal as _};

use crate::output;

/// Tells the story on standard output.
#[derive(Default)]
pub(super) struct Story {
    step: u32,
}

impl Story {
    /// A new step.
    pub(super) fn step(&mut self, what: impl Display) -> io::Result<()> {
        self.step += 1;
        output::line("")?;
        output::line(bold(&format!("{}. {what}", self.step)))
    }

    /// A fact of the step.
    pub(super) fn fact(&self, name: &str, value: impl Display) -> io::Result<()> {
        output::line(format_args!("   {name:<12} {value}"))
    }

    /// Lines of another program.
    pub(super) fn quote(&self, text: &str) -> io::Result<()> {
        text.lines().try_for_each(|line| output::line(format_args!("   | {line}")))
    }

    /// An attack, and how it was refused.
    pub(super) fn refused(&self, attack: &str, why: impl Display) -> io::Result<()> {
        output::line(format_args!("   {attack}"))?;
        let why = why.to_string();
        let mut lines = wrap(&why, WIDTH - 14).into_iter();
        output::line(format_args!("     {} {}", bold("refused:"), lines.next().unwrap_or_default()))?;
        lines.try_for_each(|line| output::line(format_args!("              {line}")))
    }
}

/// Columns of the story.
const WIDTH: usize = 120;

/// Breaks a text between words, where they are not too long for that.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Bold on a terminal, plain elsewhere.
pub(super) fn bold(text: &str) -> String {
    if io::stdout().is_terminal() { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
}
