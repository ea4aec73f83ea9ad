//! What is shown of a disk: as JSON, and in words.

use nacre_disk::{Disk, Info};
use serde_json::{Value, json};

use super::rundir::Record;
use crate::{output, progress::size};

/// A closed disk.
pub(super) fn closed(info: &Info) -> anyhow::Result<Value> {
    with(info, &json!({ "state": "closed" }))
}

/// A running disk, with what it has counted.
pub(super) fn running(disk: &Disk, record: &Record) -> anyhow::Result<Value> {
    let more = json!({
        "state": "running",
        "devices": record.devices,
        "pid": record.pid,
        "statistics": disk.statistics(),
    });
    with(&disk.info(), &more)
}

fn with(info: &Info, more: &Value) -> anyhow::Result<Value> {
    let mut value = serde_json::to_value(info)?;
    if let (Some(fields), Some(more)) = (value.as_object_mut(), more.as_object()) {
        fields.extend(more.clone());
    }
    Ok(value)
}

/// For people.
pub(super) fn print(value: &Value) -> std::io::Result<()> {
    let number = |key: &str| value[key].as_u64().unwrap_or_default();
    let text = |key: &str| value[key].as_str().unwrap_or("none").to_owned();
    let list = |key: &str| -> Vec<String> {
        value[key].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let line = |name: &str, what: &dyn std::fmt::Display| output::line(format_args!("{name:<12}{what}"));
    line("disk", &text("uuid"))?;
    line("store", &text("store"))?;
    let running = value["state"] == "running";
    let state = match (running, value["clean"].as_bool().unwrap_or_default()) {
        (true, _) => format!("running in process {}", number("pid")),
        (false, true) => "closed".to_owned(),
        (false, false) => "not closed in good order; what was flushed is there".to_owned(),
    };
    line("state", &state)?;
    for device in list("devices") {
        line("device", &device)?;
    }
    line("size", &size(number("size")))?;
    line("used", &format_args!("{} of the store", size(number("used_blocks") * 4096)))?;
    line("commit", &number("sequence"))?;
    line(
        "written",
        &format_args!("{} by users, {} to the store", size(number("written_user")), size(number("written_store"))),
    )?;
    line("anchor", &text("anchor"))?;
    for (index, guarantee) in list("guarantees").iter().enumerate() {
        line(if index == 0 { "guaranteed" } else { "" }, guarantee)?;
    }
    for warning in list("warnings") {
        line("warning", &warning)?;
    }
    if running { statistics(&value["statistics"]) } else { Ok(()) }
}

fn statistics(value: &Value) -> std::io::Result<()> {
    let number = |key: &str| value[key].as_u64().unwrap_or_default();
    let line = |name: &str, what: &dyn std::fmt::Display| output::line(format_args!("{name:<12}{what}"));
    for (name, count, latency) in [
        ("reads", "reads", "read_latency"),
        ("writes", "writes", "write_latency"),
        ("flushes", "flushes", "flush_latency"),
    ] {
        line(name, &format_args!("{}{}", number(count), quantiles(&value[latency])))?;
    }
    let amplification = value["write_amplification"].as_f64().unwrap_or_default();
    let cleaned = size(number("cleaned_bytes"));
    line(
        "amplified",
        &format_args!("{amplification:.2} bytes written for each byte of users; {cleaned} moved by cleaning"),
    )?;
    let (hits, misses) = (number("cache_hits"), number("cache_misses"));
    let share = (hits * 1000).checked_div(hits + misses).unwrap_or(1000);
    line("index", &format_args!("{}.{} % of look-ups found in memory", share / 10, share % 10))?;
    let (stalls, longest) = (number("stalls"), number("longest_stall_micros"));
    line("stalls", &format_args!("{stalls}, the longest {longest} µs"))?;
    line("faults", &format_args!("{} blocks were not what they had to be", number("integrity_errors")))
}

/// The bounds within which half, and 99 of 100, of all requests were done.
fn quantiles(latency: &Value) -> String {
    let buckets: Vec<u64> =
        latency["buckets"].as_array().into_iter().flatten().map(|count| count.as_u64().unwrap_or_default()).collect();
    let all: u64 = buckets.iter().sum();
    let bound = |percent: u64| {
        let mut sum = 0;
        let reached = |count: &u64| {
            sum += count;
            sum * 100 >= all * percent
        };
        let bucket = buckets.iter().position(reached).unwrap_or_default();
        1_u64.checked_shl(u32::try_from(bucket).unwrap_or(63)).unwrap_or(u64::MAX)
    };
    if all == 0 { String::new() } else { format!(", half within {} µs, 99 % within {} µs", bound(50), bound(99)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_bounds_of_buckets() {
        assert_eq!(quantiles(&json!({ "buckets": [0, 0, 98, 1, 1] })), ", half within 4 µs, 99 % within 8 µs");
        assert_eq!(quantiles(&json!({ "buckets": [0, 0] })), "");
        assert_eq!(quantiles(&Value::Null), "");
    }
}
