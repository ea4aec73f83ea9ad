//! What is done to disks that nobody runs: format, info, check, grow, rekey.

use std::sync::Arc;

use anyhow::Context as _;
use nacre_anchor::AnchorSpec;
use nacre_core::{Anchor, AnchorError, BlockStore};
use nacre_disk::{CheckOptions, Disk, FormatOptions, OpenOptions, Report, RootKey, change_key, rotate};
use serde_json::Value;

use super::{
    info,
    key::{self, Source},
    store::StoreName,
};
use crate::{
    args::{
        Global,
        disk::{CheckArgs, FormatArgs, GrowArgs, InfoArgs, RekeyArgs},
    },
    exit::{Damaged, Usage},
    output,
    setup::Setup,
};

pub(super) fn format(global: &Global, args: &FormatArgs) -> anyhow::Result<()> {
    let setup = Setup::new(global, args.json)?;
    let name = StoreName::parse(&args.store)?;
    let root = Source::from(&args.key).read(global)?;
    let spec = &args.anchor.anchor;
    let anchor = Source::from(&args.key).anchor(global, spec, &root)?;
    let new = name.is_new()?;
    let options = FormatOptions {
        size: args.size.map(|size| size.0),
        reserve_percent: args.reserve,
        force: args.force,
        // Only then is there anything on it: the noise that it was filled with.
        fresh_store: new && args.preallocate,
        ..FormatOptions::default()
    };
    let store = match new {
        true => {
            if options.size.is_none() {
                return Err(
                    Usage(format!("{name}: there is nothing yet: say how large the disk is to be (--size)")).into()
                );
            }
            name.create(nacre_disk::store_size_for(&options)?, args.preallocate, &*setup.progress)?
        }
        false => existing(&name, &options)?,
    };
    let made = take_anchor(args.force, spec, &root, anchor.as_deref())
        .and_then(|()| Ok(nacre_disk::format(&*store, &root, anchor.as_deref(), &options)?))
        .and_then(|()| Ok(nacre_disk::closed_info(&*store, &root, anchor.as_deref(), false)?));
    if made.is_err() && new {
        drop(store);
        name.remove();
    }
    let made = made?;
    if args.json {
        return output::json(&made);
    }
    if anchor.is_none() {
        setup
            .progress
            .note("without an anchor, an older copy of the whole store cannot be told from the disk (--anchor)");
    }
    Ok(output::line(made.uuid)?)
}

/// A store that is there already; a file grows to what the disk needs.
fn existing(name: &StoreName, options: &FormatOptions) -> anyhow::Result<Arc<dyn BlockStore>> {
    let store = name.open(false)?;
    if options.size.is_some() {
        let needed = nacre_disk::store_size_for(options)?;
        // A device that is too small is told so, with both sizes, when it is formatted.
        if store.size() < needed
            && let Err(error) = store.grow(needed)
        {
            tracing::debug!(%error, "the store does not grow");
        }
    }
    Ok(store)
}

/// With `--force`, also an anchor that another key wrote is taken over: it is emptied first.
fn take_anchor(force: bool, spec: &AnchorSpec, root: &RootKey, anchor: Option<&dyn Anchor>) -> anyhow::Result<()> {
    match anchor.map(Anchor::read) {
        Some(Err(AnchorError::Untrusted { .. })) if force => key::forget_anchor(spec, root),
        _ => Ok(()),
    }
}

pub(super) fn info(global: &Global, args: &InfoArgs) -> anyhow::Result<Value> {
    let name = StoreName::parse(&args.what)?;
    // What is not there is said before a key is asked for.
    let store = name.open(true)?;
    let source = Source::from(&args.key);
    if !source.is_some() {
        let text = format!("{name}: the disk does not run; to look into a closed one its key is needed (--key-file)");
        return Err(Usage(text).into());
    }
    let root = source.read(global)?;
    let anchor = Source::from(&args.key).anchor(global, &args.anchor.anchor, &root)?;
    info::closed(&nacre_disk::closed_info(&*store, &root, anchor.as_deref(), args.accept_rollback)?)
}

pub(super) fn check(global: &Global, args: &CheckArgs) -> anyhow::Result<()> {
    let setup = Setup::new(global, args.json)?;
    let name = StoreName::parse(&args.store)?;
    let root = Source::from(&args.key).read(global)?;
    let anchor = Source::from(&args.key).anchor(global, &args.anchor.anchor, &root)?;
    let CheckArgs { threads, dump_layout, accept_rollback, .. } = *args;
    let options = CheckOptions { threads, dump_layout, accept_rollback };
    let report = nacre_disk::check(name.open(true)?, &root, anchor, &options, &*setup.progress)?;
    if args.json {
        output::json(&report)?;
    } else {
        print(&report)?;
    }
    match (report.damaged.len(), report.inconsistent.len()) {
        (0, 0) => Ok(()),
        (0, count) => Err(Damaged(format!(
            "{name}: {count} faults of the bookkeeping; everything can be read: copy it to a new disk"
        ))
        .into()),
        (count, _) => Err(Damaged(format!("{name}: {count} ranges cannot be read")).into()),
    }
}

fn print(report: &Report) -> std::io::Result<()> {
    if !report.layout.is_empty() {
        let rows = report.layout.iter().map(|region| {
            let used = region.used.map_or_else(|| "-".to_owned(), |used| used.to_string());
            vec![region.first.to_string(), region.blocks.to_string(), used, region.name.clone()]
        });
        let rows: Vec<Vec<String>> = rows.collect();
        output::table(&["FIRST", "BLOCKS", "USED", "WHAT"], &rows)?;
    }
    for warning in &report.warnings {
        output::line(format_args!("warning: {warning}"))?;
    }
    for fault in &report.inconsistent {
        output::line(format_args!("fault: {fault}"))?;
    }
    for nacre_disk::Damage { first, count, what } in &report.damaged {
        let last = first + count.saturating_sub(1);
        output::line(format_args!("damaged: LBA {first} to {last}: {what}"))?;
    }
    output::line(format_args!(
        "{} data blocks and {} index blocks verified, up to commit {}",
        report.data_blocks, report.index_blocks, report.sequence
    ))
}

pub(super) fn grow(global: &Global, args: &GrowArgs) -> anyhow::Result<()> {
    let name = StoreName::parse(&args.what)?;
    let store = name.open(false)?;
    let root = Source::from(&args.key).read(global)?;
    let anchor = Source::from(&args.key).anchor(global, &args.anchor.anchor, &root)?;
    let options = OpenOptions { background: false, ..OpenOptions::default() };
    let disk = Disk::open(store, &root, anchor, &options)?;
    let grown = disk.resize(args.size.0);
    let closed = disk.close();
    grown?;
    Ok(closed?)
}

/// Changes the key. A crash on the way leaves a disk that one of the two keys opens, with the anchor that was named for that key.
pub(super) fn rekey(global: &Global, args: &RekeyArgs) -> anyhow::Result<()> {
    let new = Source {
        file: args.new_key_file.as_deref(),
        fd: args.new_key_fd,
        resource: args.new_key_resource.as_deref(),
        broker: &args.key.broker,
    };
    if !new.is_some() && !args.rotate {
        return Err(Usage("name the new key (--new-key-file), or ask for --rotate".into()).into());
    }
    let name = StoreName::parse(&args.store)?;
    let store = name.open(false)?;
    let old = Source::from(&args.key).read(global)?;
    let before = Source::from(&args.key).anchor(global, &args.anchor.anchor, &old)?;
    // The disk has to be sound before anything of it is changed.
    nacre_disk::closed_info(&*store, &old, before.as_deref(), false)?;
    let root = if new.is_some() { new.read(global)? } else { old };
    if new.is_some() {
        let old = Source::from(&args.key).read(global)?;
        let moved = move_anchor(global, args, &root, before.as_deref())?;
        change_key(&*store, &old, &root)?;
        if moved {
            key::forget_anchor(&args.anchor.anchor, &old).context("the disk has its new key; the old anchor stays")?;
        }
    }
    if args.rotate {
        rotate(&*store, &root)?;
    }
    Ok(())
}

/// Brings the anchor's state to where the new key has it. Whether there is an old one to be removed.
fn move_anchor(global: &Global, args: &RekeyArgs, root: &RootKey, before: Option<&dyn Anchor>) -> anyhow::Result<bool> {
    let spec = &args.anchor.anchor;
    let (Some(before), Some(after)) = (before, &args.new_anchor) else {
        return match (spec, &args.new_anchor) {
            (AnchorSpec::Tpm { .. }, None) => Err(Usage(
                "a TPM's index belongs to a key: name another one for the new key, as in --new-anchor tpm:…,index=0x01800011".into(),
            )
            .into()),
            (AnchorSpec::None, Some(_)) => {
                Err(Usage("the disk has no anchor that could move (--new-anchor)".into()).into())
            }
            _ => Ok(false),
        };
    };
    if after == spec || *after == AnchorSpec::None {
        return Err(Usage("--new-anchor has to be another anchor than --anchor".into()).into());
    }
    let state = before.read()?;
    let after = Source::from(&args.key).anchor(global, after, root)?.context("an anchor was named")?;
    match (after.read()?, &state) {
        // An earlier attempt came this far.
        (found, state) if found == *state => {}
        (None, Some(state)) => after.advance(None, state)?,
        (Some(_), _) | (None, None) => {
            return Err(Usage(format!("{}: it is in use already", after.describe())).into());
        }
    }
    Ok(true)
}
