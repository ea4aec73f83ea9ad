//! `nacre-guestd`: the guest's daemon. It pulls images, mounts bundles and releases resources for the guest's other programs.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser, Subcommand, error::ErrorKind};
use nacre_core::NoProgress;
use nacre_guest::{
    config::Config,
    service::ImageService,
    services::Services,
    store::{Marks, Store},
};
use nacre_lazyd::{ByDaemon, KeepArgs, Problem, Program, ServeArgs};
use nacre_sys::end::EndSignals;

/// Serve image pull, resources and key unwrapping to the guest's programs, over ttrpc.
#[derive(Debug, Parser)]
#[command(name = "nacre-guestd", version, subcommand_negates_reqs = true)]
struct Args {
    /// The configuration file
    #[arg(
        long,
        env = "NACRE_CONFIG",
        value_name = "FILE",
        required_unless_present = "init_data",
        conflicts_with = "init_data"
    )]
    config: Option<PathBuf>,
    /// Init data that carry the configuration as nacre.toml: measured, and bound into the guest's evidence
    #[arg(long, value_name = "FILE")]
    init_data: Option<PathBuf>,
    /// The platform key of the simulated TEE, where there is no TEE
    #[arg(long, value_name = "FILE")]
    sim_platform_key: Option<PathBuf>,
    /// The image store [default: the configuration's, or else /run/nacre/store]
    #[arg(long, env = "NACRE_ROOT", value_name = "DIR")]
    root: Option<PathBuf>,
    /// The socket to serve at
    #[arg(long, value_name = "PATH", default_value = "/run/confidential-containers/cdh.sock")]
    socket: PathBuf,
    /// What to log to standard error
    #[arg(long, env = "NACRE_LOG", value_name = "FILTER", default_value = "info")]
    log: String,
    #[command(subcommand)]
    part: Option<Part>,
}

/// Processes that this program starts of itself, so that the images of bundles outlive it.
#[derive(Debug, Subcommand)]
enum Part {
    /// Serve lazy images
    #[command(hide = true, subcommand)]
    LazyDaemon(LazyDaemon),
}

#[derive(Debug, Subcommand)]
enum LazyDaemon {
    /// Hold what keeps mounts alive, and start the daemon
    Keep(KeepArgs),
    /// Be the daemon
    Serve(ServeArgs),
}

fn main() -> ExitCode {
    nacre_sys::stage::enter();
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_new(&args.log)
        .unwrap_or_else(|error| Args::command().error(ErrorKind::ValueValidation, format!("--log: {error}")).exit());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
    let ended = match &args.part {
        None => serve(&args).map(|()| 0),
        Some(Part::LazyDaemon(LazyDaemon::Keep(keep))) => nacre_lazyd::keep(&program(&args), keep),
        Some(Part::LazyDaemon(LazyDaemon::Serve(serve))) => nacre_lazyd::serve(&program(&args), serve),
    };
    match ended {
        Ok(code) => u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from),
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// How this program is called to serve lazy images.
fn program(args: &Args) -> Program {
    let exit = |error: &anyhow::Error| match error.downcast_ref() {
        Some(Problem::Refused { exit, .. }) => *exit,
        _ => 1,
    };
    Program { name: "nacre-guestd", command: &["lazy-daemon"], log: Some(args.log.clone()), exit }
}

fn serve(args: &Args) -> anyhow::Result<()> {
    let end = EndSignals::hold().context("hold back signals")?;
    let mut config = match (&args.config, &args.init_data) {
        (_, Some(path)) => Config::from_init_data(path)?,
        (Some(path), None) => Config::read(path)?,
        (None, None) => unreachable!("clap asks for one of them"),
    };
    if let (Some(broker), Some(key)) = (&mut config.broker, &args.sim_platform_key) {
        broker.sim_platform_key = Some(key.clone());
    }
    let root = args.root.clone().or_else(|| config.root.clone()).unwrap_or_else(|| "/run/nacre/store".into());
    let store = Store::open(&root, Marks::Trusted, config.allow_tmpfs)?;
    let collected = store.collect()?;
    tracing::info!(layers = collected.layers.len(), staging = collected.staging, "the store is clean");
    let mut service = ImageService::new(&config, store, Arc::new(NoProgress))?;
    service.measure_policy()?;
    if !nacre_sys::userns::is_inside() {
        // Another process serves what bundles read, so that it outlives this one.
        let (options, front) = (service.lazy_options().clone(), service.lazy_front());
        service = service.with_mounter(Arc::new(ByDaemon { program: program(args), options, front, bound: false }));
    }
    service.attest_on_schedule()?;
    let service = Arc::new(service);
    if service.broker().is_some_and(|broker| broker.simulated()) {
        tracing::warn!("the TEE is simulated: it measures and signs, but protects nothing");
    }
    let services = Services::start(&args.socket, service)?;
    tracing::info!(socket = %args.socket.display(), "serving");
    end.wait().context("wait for a signal")?;
    drop(services);
    Ok(())
}
