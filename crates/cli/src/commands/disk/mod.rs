//! `nacre disk`: make, open, serve, show, check, grow, rekey.
//!
//! `open` and `serve` run a disk (`run`) until they are told to end; other commands find it in the run directory (`rundir`) and talk to it
//! over its control socket (`control`). The rest works on closed disks (`closed`).

mod closed;
mod control;
mod info;
mod key;
mod metrics;
mod open;
mod run;
mod rundir;
mod serve;
mod store;

pub(crate) use control::Refused;
use control::Request;
pub(crate) use open::is_usage;
use rundir::RunDir;

use crate::{
    args::{
        Global,
        disk::{CloseArgs, DiskCommand, GrowArgs, InfoArgs},
    },
    exit::Missing,
    output,
    setup::Setup,
};

/// The exit code.
pub(crate) fn disk(global: &Global, command: &DiskCommand) -> anyhow::Result<i32> {
    match command {
        DiskCommand::Open(args) => return open::open(global, args),
        DiskCommand::Format(args) => closed::format(global, args),
        DiskCommand::Serve(args) => serve::serve(global, args),
        DiskCommand::Close(args) => close(args),
        DiskCommand::Info(args) => show(global, args),
        DiskCommand::Check(args) => closed::check(global, args),
        DiskCommand::Grow(args) => grow(global, args),
        DiskCommand::Rekey(args) => closed::rekey(global, args),
    }?;
    Ok(0)
}

fn close(args: &CloseArgs) -> anyhow::Result<()> {
    match RunDir::of(&args.run)?.find(&args.what)? {
        Some((_, socket)) => control::ask(&socket, Request::Close).map(|_| ()),
        None => Err(Missing(format!("{}: no disk of that name runs", args.what)).into()),
    }
}

fn show(global: &Global, args: &InfoArgs) -> anyhow::Result<()> {
    // Without a run directory nothing runs that could be found.
    let running = RunDir::of(&args.run).and_then(|run| run.find(&args.what)).ok().flatten();
    let value = match running {
        Some((_, socket)) => control::ask(&socket, Request::Info)?,
        None => closed::info(global, args)?,
    };
    if args.json { output::json(&value) } else { Ok(info::print(&value)?) }
}

fn grow(global: &Global, args: &GrowArgs) -> anyhow::Result<()> {
    let running = RunDir::of(&args.run).and_then(|run| run.find(&args.what)).ok().flatten();
    match running {
        Some((record, socket)) => {
            control::ask(&socket, Request::Grow { size: args.size.0 })?;
            // Loop devices grow as well.
            let stays = |device: &String| device.starts_with("/dev/") && !device.starts_with("/dev/loop");
            if record.devices.iter().any(stays) {
                let note = "the disk has grown; its device keeps its size until the disk is opened again";
                Setup::new(global, false)?.progress.note(note);
            }
            Ok(())
        }
        None => closed::grow(global, args),
    }
}
