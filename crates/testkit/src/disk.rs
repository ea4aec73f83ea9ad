//! A disk that is soon full.

use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::root;

/// A tmpfs of a few bytes, unmounted when it is dropped.
#[derive(Debug)]
pub struct SmallDisk {
    path: PathBuf,
    _holder: tempfile::TempDir,
}

impl SmallDisk {
    /// Mounts one of `bytes` bytes; `None`, after a loud skip, where that is not allowed.
    pub fn mount(bytes: u64) -> Option<Self> {
        if !root() {
            return None;
        }
        let holder = tempfile::tempdir().unwrap();
        let path = holder.path().join("disk");
        std::fs::create_dir(&path).unwrap();
        let options = std::ffi::CString::new(format!("size={bytes},mode=0755")).unwrap();
        if let Err(error) = mount("tmpfs", &path, "tmpfs", MountFlags::NODEV, Some(options.as_c_str())) {
            crate::skip(&format!("a tmpfs cannot be mounted here: {error}"));
            return None;
        }
        Some(Self { path, _holder: holder })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it read-only, or writable again.
    pub fn set_read_only(&self, read_only: bool) {
        let flags = if read_only { MountFlags::RDONLY } else { MountFlags::empty() };
        rustix::mount::mount_remount(&self.path, flags, "").unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = unmount(&self.path, UnmountFlags::DETACH);
    }
}
