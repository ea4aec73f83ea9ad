//! `nacre demo`: everything at work on one machine. A registry, a key broker, an encrypted and signed image, an attested guest; then
//! three attacks, each refused.
//!
//! The guest is a process of its own (module `guest`), so that its measurement is that of a real program; the rest runs in this process.

mod guest;
mod rootfs;
mod stage;
mod story;
mod workload;

use anyhow::Context as _;
use nacre_sys::privilege::Privilege;

pub(crate) use guest::run as guest;
pub(crate) use workload::run as workload;

use crate::{
    args::{DemoArgs, Global},
    output,
};
use guest::Report;
use stage::{Outcome, SIGNED, Stage, UNSIGNED};
use story::Story;

/// Runs the demo.
pub(crate) fn demo(global: &Global, args: &DemoArgs) -> anyhow::Result<()> {
    let privilege = Privilege::detect();
    if let Privilege::Missing(missing) = privilege {
        return Err(missing.into());
    }
    let stage = Stage::set(args.dir.as_deref(), global.allow_tmpfs)?;
    let told = tell(&stage, &privilege);
    let place = stage.clear(args.keep)?;
    told?;
    output::line("")?;
    match place {
        Some(place) => {
            Ok(output::line(format_args!("Everything is in {} (the registry was in memory).", place.display()))?)
        }
        None => Ok(output::line("Everything that the demo made is removed; `--keep` leaves it.")?),
    }
}

fn tell(stage: &Stage, privilege: &Privilege) -> anyhow::Result<()> {
    let mut story = Story::default();
    prologue(&mut story, stage, privilege)?;
    let outcome = stage.run_guest(&stage.guest_program(), SIGNED)?;
    let report = match &outcome {
        Outcome::Ran { report, .. } => report,
        Outcome::Refused { error, .. } => anyhow::bail!("the guest did not run the image: {error}"),
    };
    launch(&mut story, stage, report, &outcome)?;
    attacks(&mut story, stage)
}

fn prologue(story: &mut Story, stage: &Stage, privilege: &Privilege) -> anyhow::Result<()> {
    output::line(story::bold("Nacre demo: an encrypted, signed image runs in an attested guest."))?;
    output::line(
        "Everything listens on loopback only. The TEE is simulated: it measures and signs, but protects nothing.",
    )?;

    story.step("Somebody ships an image")?;
    story.fact("registry", format_args!("{} (trusts nobody, is trusted by nobody)", stage.registry().host()))?;
    story.fact("image", stage.reference(SIGNED))?;
    for layer in &stage.shipped().layers {
        story.fact("layer", format_args!("{} {}", layer.to.short(), layer.media_type))?;
    }
    story.fact("manifest", stage.shipped().to)?;
    story.fact("encrypted", format_args!("each layer with a key of its own, wrapped by {}", stage::KEY_ID))?;
    story.fact("signed", format_args!("with a cosign key, {}", stage.signer()))?;

    story.step("A key broker knows whom to trust")?;
    story.fact("broker", format_args!("{} (certificate pinned in the guest's init data)", stage.broker_url()))?;
    story.fact("holds", stage::KEY_ID)?;
    story.fact("expects", format_args!("measurement {}…", cut(stage.measurement())))?;
    story.fact("", format_args!("init data   {}…", cut(stage.init_data_digest())))?;
    story.fact("policy", "release to guests whose appraisal affirms executables, hardware and configuration")?;

    story.step("A guest starts, attests, pulls, verifies, decrypts and runs the image")?;
    let how = match privilege {
        Privilege::Full => "as root",
        _ => "in a user namespace",
    };
    story.fact("guest", format_args!("a process of its own, {how}"))?;
    Ok(())
}

fn launch(story: &mut Story, stage: &Stage, report: &Report, outcome: &Outcome) -> anyhow::Result<()> {
    story.fact("runtime", &report.runtime)?;
    story.fact("layers", format_args!("{} fetched, checked, unpacked, mounted", report.fetched))?;
    story.quote(outcome.output())?;
    if !outcome.output().contains(rootfs::MESSAGE) {
        anyhow::bail!("the container did not print what its encrypted layer says");
    }

    story.step("The chain of trust")?;
    for entry in
        stage.broker().audit(0, 1000)?.iter().filter(|entry| ["attested", "released"].contains(&entry.event.as_str()))
    {
        let what = match entry.event.as_str() {
            "attested" => format!("{} measured {}…", entry.actor, cut(&entry.measurement)),
            _ => format!("{} to {}", entry.subject, entry.actor),
        };
        let simulated = if entry.simulated { " (simulated TEE)" } else { "" };
        story.fact(&entry.event, format_args!("{what}{simulated}"))?;
    }
    story.fact("policy", &report.rule)?;
    story.fact("signed by", report.signers.join(", "))?;
    story.fact("admitted", format_args!("{}, {}", report.kind, report.manifest))?;
    Ok(())
}

fn attacks(story: &mut Story, stage: &Stage) -> anyhow::Result<()> {
    story.step("Three attacks")?;
    stage.flip_bit()?;
    refused(story, stage, "The registry flips one bit of an encrypted layer.", SIGNED)?;
    stage.mend()?;
    refused(story, stage, "The registry offers the image without its signature, under another tag.", UNSIGNED)?;
    let program = stage.altered_program()?;
    let outcome = stage.run_guest(&program, SIGNED)?;
    refusal(story, "The host starts a guest whose program has one byte more.", &outcome)
}

fn refused(story: &mut Story, stage: &Stage, attack: &str, tag: &str) -> anyhow::Result<()> {
    let outcome = stage.run_guest(&stage.guest_program(), tag)?;
    refusal(story, attack, &outcome)
}

fn refusal(story: &mut Story, attack: &str, outcome: &Outcome) -> anyhow::Result<()> {
    match outcome {
        Outcome::Ran { .. } => anyhow::bail!("an attack succeeded: {attack}"),
        Outcome::Refused { error, code } => {
            let code = code.context("the guest was killed")?;
            anyhow::ensure!(code == 3, "the guest ended with code {code}, not for lack of trust: {error}");
            Ok(story.refused(attack, error)?)
        }
    }
}

fn cut(text: &str) -> String {
    text.chars().take(24).collect()
}
