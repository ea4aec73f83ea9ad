//! Statistics of a running disk as Prometheus text, and the small HTTP server that hands it out.

use std::{
    fmt::Write as _,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use serde_json::Value;

/// The most bytes of a request's head.
const HEAD_LIMIT: u64 = 8192;
/// How long a client may take.
const CLIENT_TIME: Duration = Duration::from_secs(5);

/// The text for a disk's size, place in use, and statistics. Counters become `nacre_disk_NAME_total`, latencies histograms in seconds.
pub(super) fn text(store: &str, size: u64, used_bytes: u64, statistics: &Value) -> String {
    let label = format!("store=\"{}\"", store.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"));
    let mut out = String::new();
    let mut single = |name: &str, kind: &str, value: &dyn std::fmt::Display| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "# TYPE {name} {kind}\n{name}{{{label}}} {value}");
    };
    single("nacre_disk_size_bytes", "gauge", &size);
    single("nacre_disk_used_bytes", "gauge", &used_bytes);
    let mut histograms = String::new();
    for (name, value) in statistics.as_object().into_iter().flatten() {
        match value {
            Value::Number(number) if number.is_u64() && !name.starts_with("longest") => {
                single(&format!("nacre_disk_{name}_total"), "counter", number);
            }
            Value::Number(number) => single(&format!("nacre_disk_{name}"), "gauge", number),
            Value::Object(_) => histogram(&mut histograms, &format!("nacre_disk_{name}_seconds"), &label, value),
            _ => {}
        }
    }
    out + &histograms
}

/// The n-th bucket counts what took less than 2^n microseconds, the last one everything else; Prometheus wants sums up to each bound.
fn histogram(out: &mut String, name: &str, label: &str, latency: &Value) {
    let number = |key: &str| latency.get(key).and_then(Value::as_u64).unwrap_or_default();
    let buckets: Vec<u64> =
        latency["buckets"].as_array().into_iter().flatten().map(|count| count.as_u64().unwrap_or_default()).collect();
    let _ = writeln!(out, "# TYPE {name} histogram");
    let mut sum = 0;
    for (power, count) in buckets.iter().enumerate().take(buckets.len().saturating_sub(1)) {
        sum += count;
        let bound = seconds(1_u64.checked_shl(u32::try_from(power).unwrap_or(u32::MAX)).unwrap_or(u64::MAX));
        let _ = writeln!(out, "{name}_bucket{{{label},le=\"{bound}\"}} {sum}");
    }
    let all: u64 = buckets.iter().sum();
    let _ = writeln!(out, "{name}_bucket{{{label},le=\"+Inf\"}} {all}");
    let _ = writeln!(out, "{name}_sum{{{label}}} {}", seconds(number("sum_micros")));
    let _ = writeln!(out, "{name}_count{{{label}}} {all}");
}

#[expect(clippy::cast_precision_loss, reason = "microseconds of a year have 45 bits")]
fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}

/// Serves the text at `address` for as long as the process lives; gives the address, whose port the system may have chosen.
pub(super) fn serve(address: SocketAddr, text: impl Fn() -> String + Send + 'static) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(address)?;
    let address = listener.local_addr()?;
    thread::Builder::new().name("metrics".into()).spawn(move || {
        for client in listener.incoming() {
            if let Err(error) = client.and_then(|client| answer(client, &text)) {
                tracing::debug!(%error, "metrics were asked for and not handed out");
                thread::sleep(Duration::from_millis(20));
            }
        }
    })?;
    Ok(address)
}

fn answer(client: TcpStream, text: &impl Fn() -> String) -> io::Result<()> {
    client.set_read_timeout(Some(CLIENT_TIME))?;
    client.set_write_timeout(Some(CLIENT_TIME))?;
    let mut lines = BufReader::new(&client).take(HEAD_LIMIT).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    // The whole head, lest the connection be reset under the answer.
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    let mut words = request.split(' ');
    let (status, body) = match (words.next(), words.next()) {
        (Some("GET"), Some("/metrics" | "/")) => ("200 OK", text()),
        (Some("GET"), Some(_)) => ("404 Not Found", "metrics are at /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", "metrics are got\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    (&client).write_all(head.as_bytes())?;
    (&client).write_all(body.as_bytes())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn statistics_become_metrics() {
        let statistics = json!({
            "reads": 3,
            "write_amplification": 1.25,
            "read_latency": { "buckets": [1, 0, 2, 4], "count": 7, "sum_micros": 1_500_000 },
        });
        let text = text("/a \"b\"\\", 4096, 512, &statistics);
        for line in [
            r#"nacre_disk_size_bytes{store="/a \"b\"\\"} 4096"#,
            "# TYPE nacre_disk_reads_total counter",
            r#"nacre_disk_reads_total{store="/a \"b\"\\"} 3"#,
            r#"nacre_disk_write_amplification{store="/a \"b\"\\"} 1.25"#,
            "# TYPE nacre_disk_read_latency_seconds histogram",
            r#"le="0.000001"} 1"#,
            r#"le="0.000002"} 1"#,
            r#"le="0.000004"} 3"#,
            r#"le="+Inf"} 7"#,
            r#"nacre_disk_read_latency_seconds_sum{store="/a \"b\"\\"} 1.5"#,
            r#"nacre_disk_read_latency_seconds_count{store="/a \"b\"\\"} 7"#,
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn metrics_are_got_over_http() {
        let address = serve(SocketAddr::from(([127, 0, 0, 1], 0)), || "x 1\n".into()).unwrap();
        let get = |request: &[u8]| {
            let mut stream = TcpStream::connect(address).unwrap();
            let _ = stream.write_all(request);
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            answer
        };
        let answer = get(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nx 1\n"), "{answer}");
        assert!(get(b"GET /x HTTP/1.1\r\n\r\n").contains(" 404 "));
        assert!(get(b"POST /metrics HTTP/1.1\r\n\r\n").contains(" 405 "));
        get(&[b'a'; 20000]);
        get(b"\xff\xfe\r\n\r\n");
        assert!(get(b"GET /metrics HTTP/1.0\r\n\r\n").contains("200 OK"), "and it goes on serving");
    }
}
