//! Who the container's program is and what it may do: ids, capabilities, limits.

use std::fs;
use std::io;

use rustix::io::Errno;
use rustix::process::{Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::spec::{Capabilities, Process, User};

/// Capability sets as the kernel has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sets {
    bounding: CapabilitySet,
    ambient: CapabilitySet,
    thread: CapabilitySets,
}

impl Sets {
    /// Reads the names.
    pub(crate) fn parse(names: &Capabilities) -> Result<Self, String> {
        let set = |names: &[String]| {
            names.iter().try_fold(CapabilitySet::empty(), |set, name| {
                let found = name.strip_prefix("CAP_").and_then(CapabilitySet::from_name);
                found.map(|one| set | one).ok_or_else(|| format!("there is no capability '{name}'"))
            })
        };
        Ok(Self {
            bounding: set(&names.bounding)?,
            ambient: set(&names.ambient)?,
            thread: CapabilitySets {
                effective: set(&names.effective)?,
                permitted: set(&names.permitted)?,
                inheritable: set(&names.inheritable)?,
            },
        })
    }
}

/// Sets the resource limits.
pub(crate) fn limit(process: &Process) -> Result<(), String> {
    for limit in &process.rlimits {
        let resource = resource(&limit.kind).ok_or_else(|| format!("there is no resource limit '{}'", limit.kind))?;
        let bound = |value| (value != u64::MAX).then_some(value);
        rustix::process::setrlimit(resource, Rlimit { current: bound(limit.soft), maximum: bound(limit.hard) })
            .map_err(|error| format!("set {}: {error}", limit.kind))?;
    }
    Ok(())
}

fn resource(name: &str) -> Option<Resource> {
    Some(match name {
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_STACK" => Resource::Stack,
        _ => return None,
    })
}

/// Becomes the user with exactly the capabilities given. For a process with one thread: the kernel's ids are a thread's.
pub(crate) fn drop_to(user: &User, sets: &Sets) -> io::Result<()> {
    // First what needs CAP_SETPCAP, which may be among those that go.
    for bit in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << bit);
        if sets.bounding.contains(one) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(one) {
            // Beyond the last capability that this kernel has.
            Err(Errno::INVAL) => break,
            result => result?,
        }
    }
    rustix::thread::set_keep_capabilities(true)?;
    set_groups(user)?;
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    rustix::thread::set_keep_capabilities(false)?;
    // What is not permitted any more cannot be asked for: a user namespace's root, say, under a smaller bounding set.
    let have = rustix::thread::capabilities(None)?.permitted;
    let permitted = sets.thread.permitted & have;
    rustix::thread::clear_ambient_capability_set()?;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: sets.thread.effective & permitted,
            permitted,
            inheritable: sets.thread.inheritable & permitted,
        },
    )?;
    for one in (sets.ambient & permitted & sets.thread.inheritable).iter() {
        rustix::thread::configure_capability_in_ambient_set(one, true)?;
    }
    Ok(())
}

fn set_groups(user: &User) -> io::Result<()> {
    let groups: Vec<Gid> = user.additional_gids.iter().copied().map(Gid::from_raw).collect();
    match rustix::thread::set_thread_groups(&groups) {
        // A user namespace without subordinate ids forbids it to everybody: the groups stay those of whoever started us.
        Err(Errno::PERM) if fs::read_to_string("/proc/self/setgroups").is_ok_and(|text| text.trim() == "deny") => {
            Ok(())
        }
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_read_by_name() {
        let names = |list: &[&str]| list.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let sets =
            Sets::parse(&Capabilities { bounding: names(&["CAP_CHOWN", "CAP_KILL"]), ..Default::default() }).unwrap();
        assert_eq!(sets.bounding, CapabilitySet::CHOWN | CapabilitySet::KILL);
        assert!(sets.thread.effective.is_empty());
        for bad in ["CHOWN", "CAP_", "CAP_NOPE", "cap_chown", ""] {
            let found = Sets::parse(&Capabilities { ambient: names(&[bad]), ..Default::default() });
            assert!(found.unwrap_err().contains(bad), "{bad}");
        }
    }

    #[test]
    fn resource_limits_are_known_by_name() {
        assert!(matches!(resource("RLIMIT_NOFILE"), Some(Resource::Nofile)));
        assert!(resource("NOFILE").is_none());
    }
}
