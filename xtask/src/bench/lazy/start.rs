//! How long applications take to their first answer over a network of 100 Mbit/s and 20 ms, and what is fetched for it.

use std::{path::Path, process::Command, time::Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{
    Bench, make,
    network::Network,
    tree::{App, FIRST, NODE, PYTHON},
};
use crate::{
    bench::Case,
    run::{output, run},
};

/// The tag of the unmodified image.
const WHOLE: &str = "whole";

pub(super) fn cases(bench: &Bench) -> Result<Vec<Case>> {
    let network = Network::before(&bench.registry.host)?;
    let ours = &bench.ours;
    // The unmodified image, which is pulled whole.
    let mut copy = ours.command(&ours.place.join("copy"));
    copy.args(["image", "copy", "--quiet", "--insecure-registry"]).arg(bench.trees.reference(FIRST));
    run(copy.arg(make::at(&bench.registry.host, WHOLE)).stdout(std::process::Stdio::null()))?;
    let mut cases = Vec::new();
    for app in [PYTHON, NODE] {
        cases.extend(app_cases(bench, &network, &app)?);
    }
    Ok(cases)
}

fn app_cases(bench: &Bench, network: &Network, app: &App) -> Result<Vec<Case>> {
    let tag = format!("traced-{}", app.name.to_lowercase().replace('.', ""));
    let touched = trace(bench, app, &tag)?;
    let (mut whole, mut lazy, mut traced, mut fetched) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 1..=bench.options.rounds {
        eprintln!("{}, round {round}", app.name);
        let at = |tag: &str| make::at(&network.host, tag);
        bench.registry.warm()?;
        whole.push(start(bench, app, &at(WHOLE), false, &format!("whole-{round}-{tag}"))?);
        let before = network.carried();
        lazy.push(start(bench, app, &at(FIRST), true, &format!("lazy-{round}-{tag}"))?);
        fetched.push((network.carried() - before) as f64 / f64::from(1 << 20));
        traced.push(start(bench, app, &at(&tag), true, &format!("traced-{round}-{tag}"))?);
    }
    let touched = vec![touched; fetched.len()];
    let name = app.name;
    Ok(vec![
        Case::against(&format!("{name}'s first answer vs a whole pull"), &lazy, &whole, 0.2),
        Case::compare_sizes(&format!("fetched for {name} vs touched"), &fetched, &touched, 1.3),
        Case::against(&format!("{name}'s first answer, with a trace vs without"), &traced, &lazy, 0.6),
    ])
}

/// Seconds of the program from nothing to the end of the application, which ends after its first answer.
fn start(bench: &Bench, app: &App, reference: &str, lazy: bool, name: &str) -> Result<f64> {
    let root = bench.ours.place.join(name);
    let mut command = bench.ours.command(&root);
    command.arg("run");
    if lazy {
        command.arg("--lazy");
    }
    bench.ours.use_image(&mut command).arg(reference).arg("--").args(app.command);
    super::reads::cold()?;
    let begin = Instant::now();
    let said = output(&mut command)?;
    let seconds = begin.elapsed().as_secs_f64();
    ensure!(said.trim() == "answered", "{} said {said:?}", app.name);
    forget(&root);
    Ok(seconds)
}

/// Removes a store, whose mounts are gone with its container.
fn forget(root: &Path) {
    let _ = Command::new("rm").arg("-rf").arg("--one-file-system").arg(root).status();
}

/// Records what a run touches, as an image of its own; gives the MiB of the chunks as they are stored.
fn trace(bench: &Bench, app: &App, tag: &str) -> Result<f64> {
    let ours = &bench.ours;
    let root = ours.place.join(format!("trace-{tag}"));
    let mut command = ours.command(&root);
    command.args(["image", "trace", "--quiet", "--json", "--encrypt"]);
    command.arg(format!("jwe:{}", ours.place.join("public.pem").display()));
    ours.use_image(&mut command).arg(make::reference(bench, FIRST)).arg(make::reference(bench, tag));
    output(command.arg("--").args(app.command))?;
    let mut command = ours.command(&root);
    command.args(["image", "inspect", "--json", "--insecure-registry", "--decryption-key"]).arg(&ours.private_key);
    let text = output(command.arg(make::reference(bench, tag)))?;
    let value: Value = serde_json::from_str(&text).context("image inspect --json")?;
    let bytes = value.pointer("/lazy/trace/stored_bytes").and_then(Value::as_f64);
    Ok(bytes.with_context(|| format!("no size of the trace: {text}"))? / f64::from(1 << 20))
}
