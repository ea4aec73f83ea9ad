//! `nacre broker guest`: what the console shows of guests, for the terminal.

use nacre_broker::{Check, GuestChain, GuestList, GuestSummary};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::Admin;
use crate::{args::broker::BrokerGuestCommand, exit::Missing, output};

fn time(seconds: i64) -> String {
    OffsetDateTime::from_unix_timestamp(seconds).ok().and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_default()
}

/// What guests say of themselves goes to a terminal: without what steers it.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

pub(super) fn guest(command: &BrokerGuestCommand) -> anyhow::Result<()> {
    match command {
        BrokerGuestCommand::Ls { refused, before, most, json, at } => {
            let list = if *refused { GuestList::Refused } else { GuestList::Attested };
            let (before, most) = (before.as_deref(), *most as usize);
            let found = match Admin::of(at)? {
                Admin::Local(broker) => broker.guests(list, before, most)?,
                Admin::Remote(client) => client.guests(list, before, most)?,
            };
            if *json {
                return output::json(&found);
            }
            let row = |guest: &GuestSummary| {
                let tee = if guest.simulated { format!("{} (simulated)", guest.tee) } else { guest.tee.clone() };
                let claims: Vec<String> =
                    guest.claims.iter().map(|claim| format!("{}={}", claim.name, claim.value)).collect();
                let what = if *refused { plain(&guest.reason) } else { claims.join(" ") };
                let measurement = guest.measurement.chars().take(16).collect();
                vec![guest.id.clone(), time(guest.time), tee, guest.verdict.clone(), measurement, what]
            };
            let rows: Vec<Vec<String>> = found.iter().map(row).collect();
            let last = if *refused { "WHY" } else { "CLAIMS" };
            Ok(output::table(&["GUEST", "TIME", "TEE", "VERDICT", "MEASUREMENT", last], &rows)?)
        }
        BrokerGuestCommand::Show { guest, json, at } => {
            let found = match Admin::of(at)? {
                Admin::Local(broker) => {
                    let missing = || Missing(format!("there is no guest {guest}, or it is not kept any more"));
                    broker.guest_chain(guest)?.ok_or_else(missing)?
                }
                Admin::Remote(client) => client.guest_chain(guest)?,
            };
            if *json {
                return output::json(&found);
            }
            show(&found)
        }
    }
}

fn show(found: &GuestChain) -> anyhow::Result<()> {
    let guest = &found.guest;
    let simulated = if guest.simulated { " (simulated)" } else { "" };
    output::line(format_args!("{} {} {}{simulated}: {}", guest.id, time(guest.time), guest.tee, guest.verdict))?;
    for (name, value) in [("key", &guest.guest), ("measurement", &guest.measurement), ("policy", &guest.policy)] {
        if !value.is_empty() {
            output::line(format_args!("{name}: {}", plain(value)))?;
        }
    }
    for (number, stage) in (1..).zip(&found.chain) {
        output::line(format_args!("\n{number}. {}: {}", stage.title, stage.verdict.name()))?;
        output::line(format_args!("   {}", plain(&stage.why)))?;
        for check in &stage.checks {
            output::line(format_args!("   - {}: {}{}", plain(&check.what), check.verdict.name(), by(check)))?;
            for expected in &check.expected {
                output::line(format_args!("       expected: {}", plain(expected)))?;
            }
            if check.more > 0 {
                output::line(format_args!("       expected: or one of {} more", check.more))?;
            }
            if let Some(found) = &check.found {
                output::line(format_args!("       found:    {}", plain(found)))?;
            }
        }
    }
    Ok(())
}

fn by(check: &Check) -> String {
    if check.by.is_empty() { String::new() } else { format!(" ({})", plain(&check.by)) }
}
