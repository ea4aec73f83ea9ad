//! What this process may do to mount filesystems and run containers.

use std::fs;

use rustix::thread::CapabilitySet;

use crate::stage::{NotReady, Stage};

/// What this process may do.
#[derive(Debug, PartialEq, Eq)]
pub enum Privilege {
    /// It may mount and run containers as it is: it has CAP_SYS_ADMIN, be it root's or that of a user namespace.
    Full,
    /// It may not, but can in a user namespace: [`crate::userns::become_root`].
    UserNamespace,
    /// It cannot.
    Missing(Missing),
}

/// What is missing, and what to do about it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// `user.max_user_namespaces` is 0.
    #[error("user namespaces are off: run as root, or set sysctl user.max_user_namespaces to more than 0")]
    NoNamespacesAllowed,
    /// The kernel has none.
    #[error("the kernel has no user namespaces (CONFIG_USER_NS): run as root")]
    NotInKernel,
    /// Debian's switch.
    #[error("user namespaces are for root only: run as root, or set sysctl kernel.unprivileged_userns_clone to 1")]
    UnprivilegedOff,
    /// Ubuntu's switch.
    #[error(
        "AppArmor keeps user namespaces from unprivileged programs: run as root, install an AppArmor profile with \
         'userns,' for this program, or set sysctl kernel.apparmor_restrict_unprivileged_userns to 0"
    )]
    AppArmor,
    /// Something else says no.
    #[error(
        "user namespaces do not work here ({0}); a container's seccomp filter may forbid them: run as root with CAP_SYS_ADMIN"
    )]
    Forbidden(String),
    /// We are in a user namespace, or root, and lack the capability.
    #[error("this process is root but lacks CAP_SYS_ADMIN, and {0}")]
    RootWithoutAdmin(Box<Missing>),
    /// The probe could not be made.
    #[error("whether user namespaces work could not be tried: {0}")]
    Probe(String),
}

impl Privilege {
    /// Finds out by trying; takes a few milliseconds where user namespaces are tried.
    pub fn detect() -> Self {
        if has_admin() {
            return Self::Full;
        }
        let missing = match try_namespace() {
            None => return Self::UserNamespace,
            Some(missing) => missing,
        };
        if rustix::process::geteuid().is_root() {
            return Self::Missing(Missing::RootWithoutAdmin(Box::new(missing)));
        }
        Self::Missing(missing)
    }
}

fn has_admin() -> bool {
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

fn try_namespace() -> Option<Missing> {
    let output = Stage::Probe.command().map_err(|error: NotReady| error.to_string()).and_then(|mut command| {
        command.env_clear().stdin(std::process::Stdio::null()).output().map_err(|error| error.to_string())
    });
    let output = match output {
        Ok(output) => output,
        Err(error) => return Some(Missing::Probe(error)),
    };
    if output.status.success() {
        return None;
    }
    let said: String = String::from_utf8_lossy(&output.stderr).trim().chars().take(200).collect();
    Some(diagnose(said, |path| fs::read_to_string(path).ok().map(|text| text.trim().to_owned())))
}

/// Names the switch that is off, given what the switches say.
fn diagnose(said: String, read: impl Fn(&str) -> Option<String>) -> Missing {
    let is = |path, value: &str| read(path).is_some_and(|found| found == value);
    if read("/proc/sys/user/max_user_namespaces").is_none() {
        Missing::NotInKernel
    } else if is("/proc/sys/user/max_user_namespaces", "0") {
        Missing::NoNamespacesAllowed
    } else if is("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        Missing::UnprivilegedOff
    } else if is("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") {
        Missing::AppArmor
    } else {
        Missing::Forbidden(said)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn diagnosis(set: &[(&str, &str)]) -> Missing {
        diagnose("EPERM".into(), |path| {
            set.iter().find(|(name, _)| path.ends_with(name)).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_switch_that_is_off_is_named() {
        assert_eq!(diagnosis(&[]), Missing::NotInKernel);
        assert_eq!(diagnosis(&[("max_user_namespaces", "0")]), Missing::NoNamespacesAllowed);
        let some = ("max_user_namespaces", "100");
        assert_eq!(diagnosis(&[some, ("unprivileged_userns_clone", "0")]), Missing::UnprivilegedOff);
        assert_eq!(diagnosis(&[some, ("apparmor_restrict_unprivileged_userns", "1")]), Missing::AppArmor);
        assert_eq!(diagnosis(&[some]), Missing::Forbidden("EPERM".into()));
    }
}
