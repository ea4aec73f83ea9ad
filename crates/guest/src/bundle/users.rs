//! Users of an image, by the image's own `/etc/passwd` and `/etc/group`.
//!
//! As container engines have it: `user[:group]`, each a name or a number. A number need not be in the files; a name must. Without a
//! group it is the user's of `/etc/passwd`, or 0, and the groups that list the user come along; with one, it is the only one. The
//! primary group is always among the supplementary ones too: otherwise a program could leave it, and with it what the group is
//! denied (CVE-2022-36109).
//!
//! The files are the image's: at most [`FILE_LIMIT`] bytes, opened beneath the root, lines that are not theirs to understand passed
//! over.

use std::io;
use std::path::Path;

use nacre_sys::beneath::Root;

/// The most bytes of `/etc/passwd` and of `/etc/group`.
const FILE_LIMIT: u64 = 4 << 20;
/// The most supplementary groups: what Linux had for decades, and far more than any image needs.
const GROUP_LIMIT: usize = 1024;
/// The largest id: above are -1, which means "no change", and what 32-bit signed programs mistake.
const ID_LIMIT: u32 = i32::MAX as u32;

/// Why a user cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// It is not `user[:group]`.
    #[error("user '{0:.100}' is not USER or USER:GROUP, each a name or a number up to {ID_LIMIT}")]
    Malformed(String),
    /// There is none.
    #[error("the image has no user '{0:.100}' in /etc/passwd; use a numeric id or one of its users")]
    NoUser(String),
    /// There is none.
    #[error("the image has no group '{0:.100}' in /etc/group; use a numeric id or one of its groups")]
    NoGroup(String),
    /// Too many groups list the user.
    #[error("user '{0:.100}' is in more than {GROUP_LIMIT} groups of the image")]
    TooManyGroups(String),
    /// The file is there, but is nothing that can be read.
    #[error("cannot read {file} of the image")]
    File {
        /// Which.
        file: &'static str,
        /// What is wrong.
        #[source]
        source: io::Error,
    },
}

/// Whom a container's program runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedUser {
    /// The user.
    pub uid: u32,
    /// The primary group.
    pub gid: u32,
    /// The supplementary groups, the primary one first.
    pub groups: Vec<u32>,
    /// The home directory, if `/etc/passwd` has one.
    pub home: Option<String>,
}

/// Finds a user in the root filesystem `root`.
///
/// # Errors
/// [`UserError`]
pub fn resolve_user_in(user: &str, root: &Root) -> Result<ResolvedUser, UserError> {
    let read = |file: &'static str| -> Result<Vec<u8>, UserError> {
        let bytes = root.read(Path::new(file), FILE_LIMIT).map_err(|source| UserError::File { file, source })?;
        Ok(bytes.unwrap_or_default())
    };
    resolve_user(user, &read("/etc/passwd")?, &read("/etc/group")?)
}

/// Finds a user in the bytes of `/etc/passwd` and `/etc/group`; an empty `user` is 0.
///
/// # Errors
/// [`UserError`]
pub fn resolve_user(user: &str, passwd: &[u8], group: &[u8]) -> Result<ResolvedUser, UserError> {
    let malformed = || UserError::Malformed(user.chars().take(100).collect());
    let (name, group_name) = match user.split_once(':') {
        Some((_, "")) => return Err(malformed()),
        Some((name, group)) => (name, Some(group)),
        None => (user, None),
    };
    let name = if name.is_empty() { "0" } else { name };
    let bad = |text: &str| text.contains([':', '\n', '\0']);
    if bad(name) || group_name.is_some_and(bad) {
        return Err(malformed());
    }
    let wanted = number(name).map_err(|()| malformed())?;
    let entry = lines(passwd).filter_map(PasswdEntry::parse).find(|entry| match wanted {
        Some(uid) => entry.uid == uid,
        None => entry.name == name,
    });
    let uid = match (wanted, &entry) {
        (Some(uid), _) => uid,
        (None, Some(entry)) => entry.uid,
        (None, None) => return Err(UserError::NoUser(name.chars().take(100).collect())),
    };
    let home = entry.as_ref().map(|entry| entry.home).filter(|home| home.starts_with('/')).map(str::to_owned);
    if let Some(group_name) = group_name {
        let gid = find_group(group_name, group, malformed)?;
        return Ok(ResolvedUser { uid, gid, groups: vec![gid], home });
    }
    let gid = entry.as_ref().map_or(0, |entry| entry.gid);
    let mut groups = vec![gid];
    if let Some(entry) = &entry {
        for (id, members) in lines(group).filter_map(parse_group).map(|(_, id, members)| (id, members)) {
            if groups.contains(&id) || !members.split(',').any(|member| member == entry.name) {
                continue;
            }
            if groups.len() == GROUP_LIMIT {
                return Err(UserError::TooManyGroups(name.chars().take(100).collect()));
            }
            groups.push(id);
        }
    }
    Ok(ResolvedUser { uid, gid, groups, home })
}

fn find_group(name: &str, group: &[u8], malformed: impl Fn() -> UserError) -> Result<u32, UserError> {
    if let Some(gid) = number(name).map_err(|()| malformed())? {
        return Ok(gid);
    }
    let found = lines(group).filter_map(parse_group).find(|(found, ..)| *found == name);
    found.map(|(_, gid, _)| gid).ok_or_else(|| UserError::NoGroup(name.chars().take(100).collect()))
}

/// `None`: it is a name. An error: it is digits, but no id.
fn number(text: &str) -> Result<Option<u32>, ()> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(None);
    }
    text.parse().ok().filter(|id| *id <= ID_LIMIT).map(Some).ok_or(())
}

fn lines(bytes: &[u8]) -> impl Iterator<Item = &str> {
    bytes.split(|byte| *byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok())
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> PasswdEntry<'a> {
    /// `name:password:uid:gid:comment:home:shell`; the last ones may be missing.
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.trim_end_matches('\r').split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let (uid, gid) = (number(fields.nth(1)?).ok()??, number(fields.next()?).ok()??);
        Some(Self { name, uid, gid, home: fields.nth(1).unwrap_or_default() })
    }
}

/// `name:password:gid:member,member`
fn parse_group(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.trim_end_matches('\r').split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let gid = number(fields.nth(1)?).ok()??;
    Some((name, gid, fields.next().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:App:/home/app:/bin/sh\n12:x:34:35::/n:\n";
    const GROUP: &[u8] = b"root:x:0:\nwheel:x:10:root,app\nextra:x:2000:other,app\napp:x:1001:app\nnear:x:7:apps,ap\n";

    fn resolved(user: &str) -> (u32, u32, Vec<u32>) {
        let user = resolve_user(user, PASSWD, GROUP).unwrap();
        (user.uid, user.gid, user.groups)
    }

    #[test]
    fn names_and_numbers_are_found_with_their_groups() {
        assert_eq!(resolved(""), (0, 0, vec![0, 10]));
        assert_eq!(resolved("root"), (0, 0, vec![0, 10]));
        assert_eq!(resolved("app"), (1000, 1001, vec![1001, 10, 2000]));
        assert_eq!(resolved("1000"), (1000, 1001, vec![1001, 10, 2000]));
        assert_eq!(resolved("app:extra"), (1000, 2000, vec![2000]));
        assert_eq!(resolved("app:5"), (1000, 5, vec![5]));
        assert_eq!(resolved("4711"), (4711, 0, vec![0]));
        assert_eq!(resolved("4711:wheel"), (4711, 10, vec![10]));
        assert_eq!(resolved(":wheel"), (0, 10, vec![10]));
        // Digits are an id, even where a user has them for a name.
        assert_eq!(resolved("12"), (12, 0, vec![0]));
        assert_eq!(resolve_user("app", PASSWD, GROUP).unwrap().home.as_deref(), Some("/home/app"));
    }

    #[test]
    fn who_is_not_there_is_named() {
        let error = |user: &str| resolve_user(user, PASSWD, GROUP).unwrap_err().to_string();
        assert!(error("nobody").contains("no user 'nobody'"));
        assert!(error("app:nogroup").contains("no group 'nogroup'"));
        assert!(error("App").contains("no user 'App'"));
        for bad in ["app:", ":", "4294967295", "2147483648", "99999999999", "0:4294967295", "a:b:c", "a\nb", "a\0"] {
            assert!(matches!(resolve_user(bad, PASSWD, GROUP), Err(UserError::Malformed(_))), "{bad:?}");
        }
        assert!(error("-1").contains("no user '-1'"));
    }

    #[test]
    fn malformed_lines_are_passed_over() {
        let broken: [&[u8]; 14] = [
            b"",
            b"app",
            b"app:x",
            b"app:x:1000",
            b"app:x:1000:",
            b"app:x::1000",
            b"app:x:-1:0::/:",
            b"app:x:0x10:0::/:",
            b"app:x:4294967295:0::/:",
            b"app:x:+5:0::/:",
            b"app:x: 5:0::/:",
            b":x:5:0::/:",
            b"\xff\xfe:x:5:0::/:",
            b"app\0:x:5:0::/:",
        ];
        for line in broken {
            let mut passwd = line.to_vec();
            passwd.extend_from_slice(b"\nlast:x:9:9::relative:\n");
            let text = String::from_utf8_lossy(line);
            assert!(matches!(resolve_user("app", &passwd, b""), Err(UserError::NoUser(_))), "{text}");
            let last = resolve_user("last", &passwd, line).unwrap();
            assert_eq!((last.uid, last.home), (9, None), "{text}");
        }
        let crlf = resolve_user("app", b"app:x:5:6::/h\r\n", b"more:x:7:app\r\n").unwrap();
        assert_eq!((crlf.uid, crlf.groups, crlf.home.as_deref()), (5, vec![6, 7], Some("/h")));
    }

    #[test]
    fn the_number_of_groups_is_bounded() {
        let group: String = (1..3000).map(|id| format!("g{id}:x:{id}:app\n")).collect();
        assert!(matches!(resolve_user("app", PASSWD, group.as_bytes()), Err(UserError::TooManyGroups(_))));
        // One group that is listed over and over is one.
        let group = "g:x:7:app\n".repeat(3000);
        assert_eq!(resolve_user("app", PASSWD, group.as_bytes()).unwrap().groups, [1001, 7]);
    }

    #[test]
    fn the_files_are_those_beneath_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        std::fs::write(&outside, "evil:x:0:0::/:\n").unwrap();
        let rootfs = dir.path().join("rootfs");
        std::fs::create_dir_all(rootfs.join("etc")).unwrap();
        let root = Root::open(&rootfs).unwrap();
        for target in [outside.to_str().unwrap(), "../../outside", "/proc/self/root/etc/passwd"] {
            std::os::unix::fs::symlink(target, rootfs.join("etc/passwd")).unwrap();
            for name in ["evil", "root"] {
                assert!(matches!(resolve_user_in(name, &root), Err(UserError::NoUser(_))), "{target}");
            }
            std::fs::remove_file(rootfs.join("etc/passwd")).unwrap();
        }
        // A link that stays inside is one that distributions have.
        std::fs::create_dir(rootfs.join("usr")).unwrap();
        std::fs::write(rootfs.join("usr/passwd"), PASSWD).unwrap();
        std::os::unix::fs::symlink("/usr/passwd", rootfs.join("etc/passwd")).unwrap();
        assert_eq!(resolve_user_in("app", &root).unwrap().uid, 1000);
        // What would hang or never end is refused.
        std::fs::remove_file(rootfs.join("etc/passwd")).unwrap();
        let mode = rustix::fs::Mode::from_raw_mode(0o644);
        rustix::fs::mkfifoat(rustix::fs::CWD, rootfs.join("etc/passwd"), mode).unwrap();
        assert!(resolve_user_in("0", &root).unwrap_err().to_string().contains("/etc/passwd"));
        std::fs::remove_file(rootfs.join("etc/passwd")).unwrap();
        std::fs::File::create(rootfs.join("etc/passwd")).unwrap().set_len(FILE_LIMIT + 1).unwrap();
        assert!(matches!(resolve_user_in("0", &root), Err(UserError::File { file: "/etc/passwd", .. })));
    }
}
