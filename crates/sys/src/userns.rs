//! A user namespace for a process that is not root: in it the process is root over its own mounts and over the ids that are mapped.
//!
//! [`become_root`] replaces the process by itself in new user and mount namespaces:
//!
//! ```text
//! program ─exec─▶ stage userns ─spawn─▶ stage idmaps      stays in the old namespace, waits for the end of its stdin
//!                     │ unshare                │
//!                     │ closes the pipe ──────▶│ newuidmap, newgidmap (setuid programs, by /etc/subuid and /etc/subgid)
//!                     │◀──── exit status ──────┘
//!                     │ if there was nothing to map: maps its own uid and gid alone
//!                     └─exec─▶ program, as root
//! ```
//! The process keeps its id, its arguments, its standard streams and its environment, so that nobody outside sees a difference.

use std::convert::Infallible;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::{env, fs};

use rustix::mount::MountPropagationFlags;
use rustix::thread::UnshareFlags;

use crate::stage::{NotReady, Stage};

/// Set for the program in the namespace, so that it never enters a second one.
const MARKER: &str = "NACRE_IN_USER_NAMESPACE";
/// The id maps stage ends so when there are no subordinate ids, or no programs to map them.
const NOTHING_TO_MAP: i32 = 3;
/// The most bytes of /etc/subuid, /etc/subgid and /proc/self/uid_map that are read.
const FILE_LIMIT: u64 = 1 << 20;

/// Why the process did not become root of a user namespace.
#[derive(Debug, thiserror::Error)]
pub enum UserNamespaceError {
    /// It is in one already, and still may not do what it needs.
    #[error(
        "already in a user namespace that Nacre made, and still without CAP_SYS_ADMIN: a security module takes it away"
    )]
    Nested,
    /// The program's `main` does not take part.
    #[error(transparent)]
    NotReady(#[from] NotReady),
    /// The program cannot be started again.
    #[error("cannot start this program again in a user namespace")]
    Exec(#[source] io::Error),
}

/// Replaces this process by the same program, with the same arguments, as root of a new user namespace. To be called early: other
/// threads end, and nothing is dropped. If the namespace cannot be made then, the program ends with a message and code 1;
/// [`crate::privilege::Privilege::detect`] tells before whether it can.
///
/// # Errors
/// [`UserNamespaceError`]; where there is none, this does not return.
pub fn become_root() -> Result<Infallible, UserNamespaceError> {
    if is_inside() {
        return Err(UserNamespaceError::Nested);
    }
    let error = Stage::UserNamespace.command()?.args(env::args_os()).exec();
    Err(UserNamespaceError::Exec(error))
}

/// Whether this process runs in a user namespace that [`become_root`] made.
pub fn is_inside() -> bool {
    env::var_os(MARKER).is_some()
}

/// The user and group ids that exist in this process's user namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MappedIds {
    uids: Vec<Range<u64>>,
    gids: Vec<Range<u64>>,
}

impl MappedIds {
    /// Those of this process; in the initial namespace all of them.
    ///
    /// # Errors
    /// /proc is not mounted.
    pub fn of_this_process() -> io::Result<Self> {
        let read = |name| -> io::Result<_> { Ok(parse_map(&fs::read_to_string(name)?)) };
        Ok(Self { uids: read("/proc/self/uid_map")?, gids: read("/proc/self/gid_map")? })
    }

    /// Whether files can belong to the user, and processes run as it.
    pub fn has_uid(&self, uid: u32) -> bool {
        self.uids.iter().any(|range| range.contains(&uid.into()))
    }

    /// Whether files can belong to the group, and processes run as it.
    pub fn has_gid(&self, gid: u32) -> bool {
        self.gids.iter().any(|range| range.contains(&gid.into()))
    }

    /// Whether every id exists, as on a machine without user namespaces.
    pub fn is_everything(&self) -> bool {
        let all = 0..u64::from(u32::MAX);
        self.uids.contains(&all) && self.gids.contains(&all)
    }
}

/// Whether processes here may change their supplementary groups; without subordinate ids a user namespace forbids it.
pub fn may_set_groups() -> bool {
    fs::read_to_string("/proc/self/setgroups").map_or(true, |text| text.trim() != "deny")
}

/// Parses `/proc/self/uid_map`: `first-inside first-outside count` a line.
fn parse_map(text: &str) -> Vec<Range<u64>> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace().map(str::parse::<u64>);
            let (first, count) = (fields.next()?.ok()?, fields.nth(1)?.ok()?);
            Some(first..first.checked_add(count)?)
        })
        .collect()
}

/// The first range of subordinate ids of a user in the text of /etc/subuid or /etc/subgid: `name-or-uid:first:count`.
fn parse_subordinate(text: &str, name: Option<&str>, uid: u32) -> Option<(u32, u32)> {
    let uid = uid.to_string();
    text.lines().find_map(|line| {
        let mut fields = line.trim().split(':');
        let who = fields.next()?;
        if who != uid && Some(who) != name {
            return None;
        }
        let (first, count): (u32, u32) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        (fields.next().is_none() && count > 0 && first.checked_add(count).is_some()).then_some((first, count))
    })
}

pub(crate) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: only unsharing the file descriptor table can break Rust's I/O safety, and no caller in this crate asks for that.
    #[expect(unsafe_code, reason = "the call can unshare file descriptors, which ours never does")]
    let result = unsafe { rustix::thread::unshare_unsafe(flags) };
    Ok(result?)
}

fn map_only_self(uid: u32, gid: u32) -> io::Result<()> {
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1"))
}

pub(crate) fn report(what: &str, error: &dyn std::fmt::Display) -> i32 {
    // A stage is a program of its own: there is nobody to return the error to, and nothing to do if stderr is closed.
    _ = writeln!(io::stderr(), "nacre: {what}: {error}");
    1
}

pub(crate) fn probe_stage() -> i32 {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let attempt = || -> io::Result<()> {
        unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNS)?;
        map_only_self(uid, gid)?;
        // AppArmor lets the namespace be made, and takes the capabilities away.
        Ok(rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?)
    };
    attempt().map_or_else(|error| report("user namespace", &error), |()| 0)
}

pub(crate) fn enter_stage(arguments: &[OsString]) -> i32 {
    match enter(arguments) {
        Ok(never) => match never {},
        Err(error) => report("cannot enter a user namespace", &error),
    }
}

fn enter(arguments: &[OsString]) -> io::Result<Infallible> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let mut helper = Stage::IdMaps
        .command()
        .map_err(io::Error::other)?
        .arg(std::process::id().to_string())
        .stdin(Stdio::piped())
        .spawn()?;
    unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNS)?;
    // Waiting closes the pipe first, which is what the helper waits for.
    match helper.wait()?.code() {
        Some(0) => {}
        Some(NOTHING_TO_MAP) => map_only_self(uid, gid)?,
        _ => return Err(io::Error::other("newuidmap and newgidmap failed halfway")),
    }
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = arguments.first() {
        command.arg0(name);
    }
    Err(command.args(arguments.iter().skip(1)).env(MARKER, "1").exec())
}

pub(crate) fn id_maps_stage(arguments: &[OsString]) -> i32 {
    // The pipe ends when the other side is in its namespace, or died: then the maps go nowhere.
    if io::stdin().read_to_end(&mut Vec::new()).is_err() {
        return 1;
    }
    let Some(pid) = arguments.first() else { return 1 };
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let name = user_name(uid);
    let range = |file| parse_subordinate(&read_limited(file)?, name.as_deref(), uid);
    let (Some(uids), Some(gids)) = (range("/etc/subuid"), range("/etc/subgid")) else { return NOTHING_TO_MAP };
    if !run_mapper("newuidmap", pid, uid, uids) {
        return NOTHING_TO_MAP;
    }
    if run_mapper("newgidmap", pid, gid, gids) { 0 } else { 1 }
}

fn run_mapper(program: &str, pid: &OsString, own: u32, (first, count): (u32, u32)) -> bool {
    let mut command = Command::new(program);
    command.arg(pid).args(["0", &own.to_string(), "1", "1", &first.to_string(), &count.to_string()]);
    // What it says would be about something that the caller does without.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
}

fn user_name(uid: u32) -> Option<String> {
    let uid = uid.to_string();
    let passwd = read_limited("/etc/passwd")?;
    let line = passwd.lines().find(|line| line.split(':').nth(2) == Some(&uid))?;
    line.split(':').next().map(str::to_owned)
}

fn read_limited(path: &str) -> Option<String> {
    let mut text = String::new();
    fs::File::open(path).ok()?.take(FILE_LIMIT).read_to_string(&mut text).ok()?;
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_read() {
        let ids = MappedIds { uids: parse_map("0 1000 1\n1 100000 65536\n"), gids: parse_map("0 1000 1") };
        assert!(ids.has_uid(0) && ids.has_uid(65536) && !ids.has_uid(65537));
        assert!(ids.has_gid(0) && !ids.has_gid(5));
        assert!(!ids.is_everything());
        let all = parse_map("         0          0 4294967295\n");
        assert!(MappedIds { uids: all.clone(), gids: all }.is_everything());
        assert!(parse_map("garbage\n1 2\n-1 0 4\n18446744073709551615 0 2\n").is_empty());
    }

    #[test]
    fn subordinate_ids_are_found_by_name_or_number() {
        let text = "root:1:1\n# comment\nada:100000:65536\n1001:200000:10\nada:300000:1\n";
        assert_eq!(parse_subordinate(text, Some("ada"), 1000), Some((100_000, 65536)));
        assert_eq!(parse_subordinate(text, None, 1001), Some((200_000, 10)));
        assert_eq!(parse_subordinate(text, Some("bob"), 1002), None);
        for bad in ["ada", "ada:", "ada:1", "ada:x:1", "ada:1:0", "ada:1:2:3", "ada:4294967295:1", "ada:-1:5"] {
            assert_eq!(parse_subordinate(bad, Some("ada"), 1000), None, "{bad}");
        }
    }
}
