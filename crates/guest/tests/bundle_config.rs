//! config.json says what the image and the caller want, and nothing that an image could smuggle in.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use nacre_guest::bundle::{BindMount, ConfigError, Machine, Network, Overrides, UserError, spec, write_config};
use nacre_oci::manifest::{ImageConfig, ProcessConfig};
use nacre_sys::spec::{NamespaceKind, Spec};

fn rootfs() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("etc")).unwrap();
    fs::write(dir.path().join("etc/passwd"), "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n")
        .unwrap();
    fs::write(dir.path().join("etc/group"), "app:x:1000:\nextra:x:2000:app\n").unwrap();
    dir
}

fn image() -> ImageConfig {
    let config =
        ProcessConfig { entrypoint: strings(&["/bin/server"]), cmd: strings(&["--port", "80"]), ..Default::default() };
    ImageConfig { architecture: "amd64".into(), os: "linux".into(), config, ..Default::default() }
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|&text| text.to_owned()).collect()
}

fn make(image: &ImageConfig, want: &Overrides) -> Result<Spec, ConfigError> {
    spec(image, want, rootfs().path(), &Machine::current().unwrap())
}

#[test]
fn command_lines_follow_the_image_unless_told_otherwise() {
    let mut image = image();
    let args = |image: &ImageConfig, entrypoint: Option<&[&str]>, args: Option<&[&str]>| {
        let want = Overrides { entrypoint: entrypoint.map(strings), args: args.map(strings), ..Default::default() };
        make(image, &want).map(|spec| spec.process.args)
    };
    assert_eq!(args(&image, None, None).unwrap(), ["/bin/server", "--port", "80"]);
    assert_eq!(args(&image, None, Some(&["-v"])).unwrap(), ["/bin/server", "-v"]);
    assert_eq!(args(&image, None, Some(&[])).unwrap(), ["/bin/server"]);
    assert_eq!(args(&image, Some(&["sh"]), None).unwrap(), ["sh"]);
    assert_eq!(args(&image, Some(&["sh"]), Some(&["-c", ""])).unwrap(), ["sh", "-c", ""]);
    image.config.entrypoint.clear();
    assert_eq!(args(&image, None, None).unwrap(), ["--port", "80"]);
    image.config.cmd.clear();
    assert!(matches!(args(&image, None, None), Err(ConfigError::NoCommand)));
    assert!(matches!(args(&image, Some(&[]), None), Err(ConfigError::NoCommand)));
    assert!(args(&image, Some(&[""]), None).is_err());
    assert!(args(&image, Some(&["a\0b"]), None).is_err());
}

#[test]
fn the_environment_has_defaults_that_image_and_caller_replace() {
    let mut image = image();
    let env = |image: &ImageConfig, want: &[&str], terminal| {
        make(image, &Overrides { env: strings(want), terminal, ..Default::default() }).map(|spec| spec.process.env)
    };
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(env(&image, &[], false).unwrap(), [path, "HOME=/root"]);
    assert_eq!(env(&image, &[], true).unwrap(), [path, "HOME=/root", "TERM=xterm"]);
    image.config.env = strings(&["PATH=/opt", "A=1", "EMPTY=", "A=2", "EQ=a=b"]);
    assert_eq!(env(&image, &["A=3", "HOME=/h"], false).unwrap(), ["PATH=/opt", "HOME=/h", "A=3", "EMPTY=", "EQ=a=b"]);
    for bad in ["novalue", "", "=x", "A=\0"] {
        assert!(env(&image, &[bad], false).unwrap_err().to_string().contains("NAME=value"), "{bad:?}");
    }
}

#[test]
fn users_are_those_of_the_image() {
    let mut image = image();
    image.config.user = "app".into();
    let process = make(&image, &Overrides::default()).unwrap().process;
    assert_eq!((process.user.uid, process.user.gid, process.user.additional_gids), (1000, 1000, vec![1000, 2000]));
    assert!(process.env.contains(&"HOME=/home/app".to_owned()));
    let want = |user: &str| make(&image, &Overrides { user: Some(user.into()), ..Default::default() });
    assert_eq!(want("7:8").unwrap().process.user.additional_gids, [8]);
    assert_eq!(want("7").unwrap().process.env.last().unwrap(), "HOME=/");
    assert!(matches!(want("nobody"), Err(ConfigError::User(UserError::NoUser(name))) if name == "nobody"));
}

#[test]
fn working_directories_are_absolute_and_clean() {
    let mut image = image();
    for (given, expected) in
        [("", "/"), ("/", "/"), ("/app/", "/app"), ("/a/./b/../c", "/a/c"), ("/../..", "/"), ("//x", "/x")]
    {
        image.config.working_dir = given.into();
        assert_eq!(make(&image, &Overrides::default()).unwrap().process.cwd, expected);
    }
    for bad in ["app", "C:\\app", "./x", "/a\0"] {
        image.config.working_dir = bad.into();
        assert!(make(&image, &Overrides::default()).unwrap_err().to_string().contains("working directory"), "{bad}");
        let want = Overrides { cwd: Some("/ok".into()), ..Default::default() };
        assert_eq!(make(&image, &want).unwrap().process.cwd, "/ok");
    }
}

#[test]
fn an_image_cannot_loosen_its_confinement() {
    let mut image = image();
    image.config.labels = BTreeMap::from([
        ("run.oci.keep_original_groups".into(), "1".into()),
        ("org.opencontainers.image.title".into(), "Oyster".into()),
        ("io.kubernetes.cri.untrusted-workload".into(), "x".into()),
    ]);
    image.config.stop_signal = Some("SIGQUIT".into());
    let config = make(&image, &Overrides::default()).unwrap();
    let annotations: Vec<&str> = config.annotations.keys().map(String::as_str).collect();
    let prefix = "org.opencontainers.image.";
    let expected = ["architecture", "os", "stopSignal", "title"].map(|name| format!("{prefix}{name}"));
    assert_eq!(annotations, expected);
    assert_eq!(config.annotations[&format!("{prefix}stopSignal")], "SIGQUIT");
    assert!(config.process.no_new_privileges);
    let capabilities = &config.process.capabilities;
    assert!(capabilities.inheritable.is_empty() && capabilities.ambient.is_empty());
    for dangerous in
        ["CAP_SYS_ADMIN", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH", "CAP_SYS_MODULE"]
    {
        assert!(!capabilities.bounding.iter().any(|name| name == dangerous), "{dangerous}");
    }
    for path in ["/proc/kcore", "/proc/keys", "/sys/firmware"] {
        assert!(config.linux.masked_paths.iter().any(|masked| masked == path), "{path}");
    }
}

#[test]
fn the_network_is_shared_unless_told_otherwise() {
    let has_network = |network| {
        let config = make(&image(), &Overrides { network, ..Default::default() }).unwrap();
        let own = config.linux.namespaces.iter().any(|namespace| namespace.kind == NamespaceKind::Network);
        let resolves = config.mounts.iter().any(|mount| mount.destination == "/etc/hosts");
        (own, resolves)
    };
    assert_eq!(has_network(Network::Host), (false, Path::new("/etc/hosts").exists()));
    assert_eq!(has_network(Network::None), (true, false));
}

#[test]
fn what_else_is_mounted_is_checked() {
    let with = |source: &str, destination: &str| {
        let bind = BindMount { source: source.into(), destination: destination.into(), read_only: true };
        make(&image(), &Overrides { mounts: vec![bind], ..Default::default() })
    };
    let config = with("/etc", "/mnt/../data").unwrap();
    let mount = config.mounts.last().unwrap();
    assert_eq!((mount.destination.as_str(), mount.source.as_deref()), ("/data", Some("/etc")));
    assert!(["rbind", "nosuid", "nodev", "ro"].iter().all(|option| mount.options.iter().any(|found| found == option)));
    for (source, destination) in
        [("etc", "/x"), ("/no such", "/x"), ("/etc", "x"), ("/etc", "/"), ("/etc", "/a/.."), ("/etc\0", "/x")]
    {
        assert!(with(source, destination).is_err(), "{source} {destination}");
    }
    for bad in ["", "a b", "a/b", "ü", &"x".repeat(65)] {
        assert!(make(&image(), &Overrides { hostname: Some(bad.into()), ..Default::default() }).is_err(), "{bad}");
    }
}

#[test]
fn a_config_is_written_whole_and_read_back_equal() {
    let dir = tempfile::tempdir().unwrap();
    let config = make(&image(), &Overrides::default()).unwrap();
    write_config(dir.path(), &config).unwrap();
    let bytes = fs::read(dir.path().join("config.json")).unwrap();
    assert_eq!(serde_json::from_slice::<Spec>(&bytes).unwrap(), config);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(json["ociVersion"], "1.0.2");
    assert_eq!(json["linux"]["resources"]["devices"][0]["allow"], false);
    assert!(write_config(Path::new("/no such"), &config).unwrap_err().to_string().contains("/no such/config.json"));
}
