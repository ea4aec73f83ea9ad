//! The demo's guest: a process that is measured, knows only its init data and its platform, and runs an image or says why not.

use std::sync::Arc;

use nacre_core::NoProgress;
use nacre_guest::{
    bundle::{Kind, Overrides, Runtime},
    config::Config,
    service::ImageService,
    store::{Marks, Store},
};
use serde::{Deserialize, Serialize};

use crate::{args::DemoGuestArgs, commands::run::run_pulled, setup};

/// What the guest says of a run that went well.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) manifest: String,
    pub(super) kind: String,
    pub(super) rule: String,
    pub(super) signers: Vec<String>,
    pub(super) fetched: usize,
    pub(super) runtime: String,
}

/// Runs an image as its init data say; gives the exit code of its process.
pub(crate) fn run(args: &DemoGuestArgs) -> anyhow::Result<i32> {
    setup::privileged()?;
    let mut config = Config::from_init_data(&args.guest_init_data)?;
    if let Some(broker) = &mut config.broker {
        broker.sim_platform_key = Some(args.platform_key.clone());
    }
    let root = tempfile::Builder::new().prefix("store-").tempdir_in(args.report.parent().unwrap_or(&args.report))?;
    let marks = if nacre_sys::userns::is_inside() { Marks::User } else { Marks::Trusted };
    let store = Store::open(root.path(), marks, config.allow_tmpfs)?;
    let service = ImageService::new(&config, store, Arc::new(NoProgress))?;
    let runtime = Runtime::find(None)?;
    let pulled = service.pull(&args.image)?;
    let admitted = pulled.admission.admitted();
    let report = Report {
        manifest: pulled.image.manifest.to_string(),
        kind: pulled.admission.kind().to_string(),
        rule: format!("{} of {}", admitted.rule(), admitted.policy()),
        signers: admitted.signers().iter().map(|signer| signer.who.clone()).collect(),
        fetched: pulled.fetched,
        runtime: match runtime.kind() {
            Kind::BuiltIn => "built-in (runc, crun and youki are not here)".into(),
            _ => runtime.path().display().to_string(),
        },
    };
    std::fs::write(&args.report, serde_json::to_vec(&report)?)?;
    run_pulled(&service, &pulled, &Overrides::default(), &runtime)
}
