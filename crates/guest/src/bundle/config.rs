//! `config.json`, from an image config and what the caller wants otherwise.
//!
//! The image decides what runs, as whom and where; it decides nothing about its confinement. Of its labels only those of the image
//! specification become annotations, since runtimes take orders from some others (`run.oci.…`).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

use nacre_oci::manifest::{ImageConfig, ProcessConfig};
use nacre_sys::beneath::Root as RootDir;
use nacre_sys::spec::{
    Capabilities, DeviceRule, Linux, Mount, Namespace, NamespaceKind, Process, Resources, Root, Spec, User, VERSION,
};
use nacre_sys::userns::{MappedIds, may_set_groups};
use serde::{Deserialize, Serialize};

use super::users::{ResolvedUser, UserError, resolve_user_in};

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const DEFAULT_HOSTNAME: &str = "nacre";
const IMAGE_ANNOTATIONS: &str = "org.opencontainers.image.";

/// What a container's root may do, at most: the usual set of container engines, less what makes devices (MKNOD) and raw packets
/// (NET_RAW: the network may be shared) and writes the audit log.
const CAPABILITIES: [&str; 11] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

const MASKED_PATHS: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
];
const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Why there is no config for a container.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Neither the image nor the caller says what to run.
    #[error("the image has no entrypoint and no command; say what to run after the image's name")]
    NoCommand,
    /// A value cannot be what it is.
    #[error("{what} '{value:.100}' {problem}")]
    Value {
        /// Which value.
        what: &'static str,
        /// It.
        value: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// There is no such user.
    #[error(transparent)]
    User(#[from] UserError),
    /// There is such a user in the image, but not here.
    #[error(
        "the container's {what} {id} does not exist in this user namespace; give your user subordinate ids in /etc/subuid and \
         /etc/subgid, run as root, or choose another user"
    )]
    NotMapped {
        /// User or group.
        what: &'static str,
        /// Its id.
        id: u32,
    },
    /// The root filesystem, or the id maps of this process, cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The config cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What the caller wants otherwise than the image has it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Overrides {
    /// Replaces the entrypoint, and the image's command with it.
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's command: what comes after the entrypoint.
    pub args: Option<Vec<String>>,
    /// `NAME=value`, added to the image's or in their place.
    pub env: Vec<String>,
    /// The working directory.
    pub cwd: Option<String>,
    /// `user[:group]`, names or numbers.
    pub user: Option<String>,
    /// The host name.
    pub hostname: Option<String>,
    /// Whether the program gets a pseudo-terminal.
    pub terminal: bool,
    /// Whether the container sees its root filesystem read-only.
    pub read_only: bool,
    /// What of the machine the container sees besides.
    pub mounts: Vec<BindMount>,
    /// Which network it has.
    pub network: Network,
    /// Whether setuid programs in the container work.
    pub new_privileges: bool,
}

/// A file or directory of the machine in the container; always without setuid and devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BindMount {
    /// What.
    pub source: PathBuf,
    /// Where in the container: an absolute path.
    pub destination: String,
    /// Whether it cannot be written there.
    pub read_only: bool,
}

/// The network of a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// That of whoever starts it, with the machine's `/etc/resolv.conf` and `/etc/hosts`.
    #[default]
    Host,
    /// One of its own, that leads nowhere.
    None,
}

/// What the machine, or the user namespace that we are in, allows.
#[derive(Clone, Debug)]
pub struct Machine {
    ids: MappedIds,
    groups: bool,
}

impl Machine {
    /// Looks at this process.
    ///
    /// # Errors
    /// [`ConfigError::Read`]: /proc is not mounted.
    pub fn current() -> Result<Self, ConfigError> {
        let ids = MappedIds::of_this_process()
            .map_err(|source| ConfigError::Read { path: "/proc/self/uid_map".into(), source })?;
        Ok(Self { ids, groups: may_set_groups() })
    }

    /// Whether this is a user namespace with some of the ids only.
    pub fn is_rootless(&self) -> bool {
        !self.ids.is_everything()
    }

    fn check(&self, user: ResolvedUser) -> Result<ResolvedUser, ConfigError> {
        if !self.ids.has_uid(user.uid) {
            return Err(ConfigError::NotMapped { what: "user", id: user.uid });
        }
        if !self.ids.has_gid(user.gid) {
            return Err(ConfigError::NotMapped { what: "group", id: user.gid });
        }
        // A group that is not mapped owns no file here.
        let groups = user.groups.into_iter().filter(|gid| self.groups && self.ids.has_gid(*gid)).collect();
        Ok(ResolvedUser { groups, ..user })
    }
}

/// Makes the config for a container of the image whose layers are mounted at `rootfs`.
///
/// # Errors
/// [`ConfigError`]
pub fn spec(image: &ImageConfig, want: &Overrides, rootfs: &Path, machine: &Machine) -> Result<Spec, ConfigError> {
    let root = RootDir::open(rootfs).map_err(|source| ConfigError::Read { path: rootfs.to_owned(), source })?;
    let user = resolve_user_in(want.user.as_deref().unwrap_or(&image.config.user), &root)?;
    let user = machine.check(user)?;
    let capabilities = CAPABILITIES.map(str::to_owned).to_vec();
    let process = Process {
        terminal: want.terminal,
        args: arguments(&image.config, want)?,
        env: environment(&image.config, want, &user)?,
        cwd: directory("working directory", want.cwd.as_deref().unwrap_or(&image.config.working_dir))?,
        // Nothing is inheritable: a program with file capabilities must not gain by it (CVE-2022-24769).
        capabilities: Capabilities {
            bounding: capabilities.clone(),
            effective: capabilities.clone(),
            permitted: capabilities,
            ..Capabilities::default()
        },
        user: User { uid: user.uid, gid: user.gid, additional_gids: user.groups },
        rlimits: Vec::new(),
        no_new_privileges: !want.new_privileges,
    };
    let mut kinds = vec![NamespaceKind::Pid, NamespaceKind::Ipc, NamespaceKind::Uts, NamespaceKind::Mount];
    if want.network == Network::None {
        kinds.push(NamespaceKind::Network);
    }
    let no_devices = Resources { devices: vec![DeviceRule { allow: false, access: "rwm".into() }] };
    Ok(Spec {
        oci_version: VERSION.into(),
        process,
        root: Root { path: "rootfs".into(), readonly: want.read_only },
        hostname: Some(hostname(want)?),
        mounts: mounts(want, machine)?,
        annotations: annotations(image),
        linux: Linux {
            namespaces: kinds.into_iter().map(|kind| Namespace { kind }).collect(),
            masked_paths: MASKED_PATHS.map(str::to_owned).to_vec(),
            readonly_paths: READONLY_PATHS.map(str::to_owned).to_vec(),
            // A user namespace cannot use devices in the first place.
            resources: (!machine.is_rootless()).then_some(no_devices),
        },
    })
}

/// Writes `config.json` into a bundle, by one rename.
///
/// # Errors
/// [`ConfigError::Write`]
pub fn write_config(bundle: &Path, spec: &Spec) -> Result<(), ConfigError> {
    let path = bundle.join("config.json");
    let new = bundle.join(".config.json.new");
    let write = || -> io::Result<()> {
        let mut file = File::create(&new)?;
        serde_json::to_writer_pretty(&mut file, spec)?;
        file.write_all(b"\n")?;
        // The rename must not become durable before the content.
        file.sync_all()?;
        fs::rename(&new, &path)
    };
    write().map_err(|source| ConfigError::Write { path: path.clone(), source })
}

fn arguments(image: &ProcessConfig, want: &Overrides) -> Result<Vec<String>, ConfigError> {
    let mut arguments = want.entrypoint.as_ref().unwrap_or(&image.entrypoint).clone();
    match &want.args {
        Some(args) => arguments.extend_from_slice(args),
        None if want.entrypoint.is_some() => {}
        None => arguments.extend_from_slice(&image.cmd),
    }
    let Some(program) = arguments.first() else { return Err(ConfigError::NoCommand) };
    if program.is_empty() {
        return Err(value("program", program, "is empty"));
    }
    if let Some(bad) = arguments.iter().find(|argument| argument.contains('\0')) {
        return Err(value("argument", bad, "has a zero byte"));
    }
    Ok(arguments)
}

fn environment(image: &ProcessConfig, want: &Overrides, user: &ResolvedUser) -> Result<Vec<String>, ConfigError> {
    let mut defaults = vec![DEFAULT_PATH.to_owned(), format!("HOME={}", user.home.as_deref().unwrap_or("/"))];
    if want.terminal {
        defaults.push("TERM=xterm".into());
    }
    let mut environment: Vec<String> = Vec::new();
    // Later ones win, in the place of the first.
    let mut place: BTreeMap<&str, usize> = BTreeMap::new();
    for entry in defaults.iter().chain(&image.env).chain(&want.env) {
        let name = match entry.split_once('=') {
            Some((name, _)) if !name.is_empty() && !entry.contains('\0') => name,
            _ => return Err(value("environment entry", entry, "is not NAME=value")),
        };
        match place.get(name).and_then(|&index| environment.get_mut(index)) {
            Some(slot) => slot.clone_from(entry),
            None => {
                place.insert(name, environment.len());
                environment.push(entry.clone());
            }
        }
    }
    Ok(environment)
}

/// An absolute path without `.` and `..`; empty is `/`.
fn directory(what: &'static str, path: &str) -> Result<String, ConfigError> {
    if path.contains('\0') {
        return Err(value(what, path, "has a zero byte"));
    }
    if !path.is_empty() && !path.starts_with('/') {
        return Err(value(what, path, "is no absolute path"));
    }
    let mut clean = PathBuf::from("/");
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => _ = clean.pop(),
            _ => {}
        }
    }
    Ok(clean.to_string_lossy().into_owned())
}

fn hostname(want: &Overrides) -> Result<String, ConfigError> {
    let name = want.hostname.as_deref().unwrap_or(DEFAULT_HOSTNAME);
    let fits = !name.is_empty()
        && name.len() <= 64
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.'));
    if fits {
        Ok(name.to_owned())
    } else {
        Err(value("host name", name, "is not 1 to 64 letters, digits, '-' and '.'"))
    }
}

fn mounts(want: &Overrides, machine: &Machine) -> Result<Vec<Mount>, ConfigError> {
    // The group tty, where there is one.
    let gid: &[&str] = if machine.ids.has_gid(5) { &["gid=5"] } else { &[] };
    let pts = [&["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"], gid].concat();
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", "devpts", &pts),
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
    ];
    // A new view of /sys belongs to whom the network belongs to, which a user namespace with the machine's does not.
    mounts.push(if machine.is_rootless() && want.network == Network::Host {
        mount("/sys", "none", "/sys", &["rbind", "nosuid", "noexec", "nodev", "ro"])
    } else {
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"])
    });
    if want.network == Network::Host {
        for file in ["/etc/resolv.conf", "/etc/hosts"].into_iter().filter(|file| Path::new(file).is_file()) {
            mounts.push(mount(file, "none", file, &["bind", "nosuid", "noexec", "nodev", "ro"]));
        }
    }
    for bind in &want.mounts {
        let destination = directory("mount point", &bind.destination)?;
        let source = bind.source.to_str().filter(|source| source.starts_with('/') && !source.contains('\0'));
        let Some(source) = source.filter(|source| Path::new(source).exists()) else {
            return Err(value(
                "mount source",
                &bind.source.to_string_lossy(),
                "is no absolute path of something that is there",
            ));
        };
        if destination == "/" {
            return Err(value("mount point", &bind.destination, "is the root itself"));
        }
        let access = if bind.read_only { "ro" } else { "rw" };
        mounts.push(mount(&destination, "none", source, &["rbind", "nosuid", "nodev", access]));
    }
    Ok(mounts)
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        destination: destination.into(),
        kind: Some(kind.into()),
        source: Some(source.into()),
        options: options.iter().map(|&option| option.to_owned()).collect(),
    }
}

fn annotations(image: &ImageConfig) -> BTreeMap<String, String> {
    let mut annotations: BTreeMap<String, String> = image
        .config
        .labels
        .iter()
        .filter(|(name, _)| name.starts_with(IMAGE_ANNOTATIONS))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    let mut set = |name: &str, value: &str| {
        if !value.is_empty() {
            annotations.insert(format!("{IMAGE_ANNOTATIONS}{name}"), value.to_owned());
        }
    };
    set("os", &image.os);
    set("architecture", &image.architecture);
    set("created", image.created.as_deref().unwrap_or_default());
    set("stopSignal", image.config.stop_signal.as_deref().unwrap_or_default());
    set("exposedPorts", &image.config.exposed_ports.keys().cloned().collect::<Vec<_>>().join(","));
    annotations
}

fn value(what: &'static str, value: &str, problem: &'static str) -> ConfigError {
    ConfigError::Value { what, value: value.chars().take(100).collect(), problem }
}
