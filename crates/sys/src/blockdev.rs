//! Block devices as their users see them: who uses one, and taking one for ourselves.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Somebody uses a device that was to be taken away.
#[derive(Debug, thiserror::Error)]
#[error("{} is in use: {}", device.display(), if users.is_empty() { "by a mount or a device that cannot be seen from here".to_owned() } else { users.join(", ") })]
pub struct InUse {
    /// The device.
    pub device: PathBuf,
    /// What uses it: `mounted on /x`, `swap`, `held by dm-0`.
    pub users: Vec<String>,
}

impl From<InUse> for io::Error {
    fn from(error: InUse) -> Self {
        Self::new(io::ErrorKind::ResourceBusy, error)
    }
}

/// What of this mount namespace, of swap, and of the kernel's stacked devices uses a block device. Processes that merely have it open
/// do not count.
pub fn users(device: &Path) -> Vec<String> {
    let mut users = BTreeSet::new();
    let number = fs::metadata(device).map(|found| (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev())));
    let number = number.map(|(major, minor)| format!("{major}:{minor}")).unwrap_or_default();
    for mount in mounts() {
        // btrfs shows a number that is no device's, but says what it was mounted from.
        if mount.device == number || Path::new(&mount.source) == device {
            users.insert(format!("mounted on {}", mount.target.display()));
        }
    }
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    if swaps.lines().skip(1).any(|line| line.split_whitespace().next().is_some_and(|path| Path::new(path) == device)) {
        users.insert("swap".to_owned());
    }
    if let Some(name) = device.file_name() {
        let system = Path::new("/sys/class/block").join(name);
        for holder in fs::read_dir(system.join("holders")).into_iter().flatten().flatten() {
            users.insert(format!("held by {}", holder.file_name().to_string_lossy()));
        }
    }
    users.into_iter().collect()
}

/// Opens a device so that nobody can mount it meanwhile.
///
/// # Errors
/// [`InUse`], or that the device is not there or cannot be opened.
pub fn claim(device: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::EXCL | rustix::fs::OFlags::CLOEXEC;
    let flags = i32::try_from(flags.bits()).map_err(io::Error::other)?;
    match OpenOptions::new().read(true).write(true).custom_flags(flags).open(device) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
            Err(InUse { device: device.to_owned(), users: users(device) }.into())
        }
        // A device that is read-only cannot be opened for more.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EROFS | libc::EACCES)) => {
            OpenOptions::new().read(true).custom_flags(flags).open(device)
        }
        result => result,
    }
}

/// A mount of this mount namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// Number of its device: `7:3`.
    pub device: String,
    /// Where it is mounted.
    pub target: PathBuf,
    /// The filesystem's type.
    pub kind: String,
    /// What was mounted.
    pub source: OsString,
}

/// All mounts that this process can see, without asking any filesystem anything: even those whose server is dead are listed.
pub fn mounts() -> Vec<MountEntry> {
    let text = fs::read("/proc/self/mountinfo").unwrap_or_default();
    text.split(|byte| *byte == b'\n').filter_map(parse_mount).collect()
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw`; proc(5).
fn parse_mount(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = String::from_utf8(fields.nth(2)?.to_vec()).ok()?;
    let target = PathBuf::from(unescape(fields.nth(1)?));
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let kind = String::from_utf8(rest.next()?.to_vec()).ok()?;
    Some(MountEntry { device, target, kind, source: unescape(rest.next()?) })
}

/// Spaces, tabs, newlines and backslashes are written as `\040`.
fn unescape(field: &[u8]) -> OsString {
    let mut result = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        result.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { after.get(3..).unwrap_or_default() } else { after };
    }
    OsString::from_vec(result)
}

/// Waits until the node of a device exists: it is made by devtmpfs at once, by a device manager somewhat later.
///
/// # Errors
/// It does not come.
pub fn wait_for_node(device: &Path, limit: Duration) -> io::Result<()> {
    wait_until(limit, || {
        fs::metadata(device)
            .is_ok_and(|found| found.file_type().is_block_device() || found.file_type().is_char_device())
    })
    .map_err(|_| {
        let text = format!("{} did not appear: is devtmpfs mounted on /dev?", device.display());
        io::Error::new(io::ErrorKind::NotFound, text)
    })
}

/// Waits until something holds, asking often at first.
pub(crate) fn wait_until(limit: Duration, mut holds: impl FnMut() -> bool) -> io::Result<()> {
    let end = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    while !holds() {
        if Instant::now() >= end {
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_with_their_escapes() {
        let line = br"36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 shared:2 - ext3 /dev/ro\134ot rw,errors=continue";
        let expected = MountEntry {
            device: "98:0".into(),
            target: "/mnt 2".into(),
            kind: "ext3".into(),
            source: "/dev/ro\\ot".into(),
        };
        assert_eq!(parse_mount(line), Some(expected));
        for broken in
            [&b""[..], b"1 2", b"1 2 3:4 / /x rw", b"1 2 3:4 / /x rw - ext4", b"\xff \xff \xff \xff \xff - \xff \xff"]
        {
            assert_eq!(parse_mount(broken), None);
        }
        assert_eq!(unescape(br"a\04"), OsString::from(r"a\04"));
        assert_eq!(unescape(br"a\9zz"), OsString::from(r"a\9zz"));
    }

    #[test]
    fn proc_is_among_the_mounts() {
        assert!(mounts().iter().any(|mount| mount.target == Path::new("/proc") && mount.kind == "proc"));
    }

    #[test]
    fn a_device_that_is_not_there_is_said_to_be_missing() {
        let missing = Path::new("/dev/no such thing");
        assert_eq!(claim(missing).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(users(missing).is_empty());
        let error = wait_for_node(missing, Duration::from_millis(5)).unwrap_err();
        assert!(error.to_string().contains("/dev/no such thing"), "{error}");
    }
}
