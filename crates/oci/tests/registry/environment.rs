//! Where the user's own files are looked for. The environment is the process's, so each test runs itself again with another.

use std::{fs, path::Path, process::Command};

use nacre_oci::{
    reference::ImageRef,
    registry::{CredentialStore, RegistriesConf},
    source::{ImageSource as _, TransportError},
};

use crate::{
    script::{Script, ok},
    support::{client_with, manifest, quick, source},
};

const CHILD: &str = "NACRE_TEST_ENVIRONMENT";
/// Every variable that says where something is.
const VARIABLES: [&str; 6] =
    ["REGISTRY_AUTH_FILE", "CONTAINERS_REGISTRIES_CONF", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "DOCKER_CONFIG", "HOME"];

/// Runs `check` on a directory, in a child with these variables only, whose values are paths within that directory.
fn with_environment(test: &str, variables: &[(&str, &str)], check: impl FnOnce(&Path)) {
    if let Some(dir) = std::env::var_os(CHILD) {
        return check(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(CHILD, dir.path());
    for name in VARIABLES {
        command.env_remove(name);
    }
    command.envs(variables.iter().map(|(name, path)| (name, dir.path().join(path))));
    let output = nacre_testkit::run(&mut command);
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "{test} is not the test's name");
}

fn write(dir: &Path, path: &str, text: &str) {
    let path = dir.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// Whose name a registry gets to see.
fn user() -> Result<Option<String>, TransportError> {
    use base64::Engine as _;
    let registry = Script::new(|head, stream| match head.to_ascii_lowercase().contains("\r\nauthorization:") {
        true => ok(stream, "200 OK", "Content-Type: application/vnd.oci.image.manifest.v1+json\r\n", &manifest()),
        false => ok(stream, "401 Unauthorized", "WWW-Authenticate: Basic realm=x\r\n", b""),
    });
    // Each file has its own path for a user, at the registry that is there now.
    let name = registry.host.clone();
    for file in AUTH_FILES {
        let path = Path::new(&std::env::var_os(CHILD).unwrap()).join(file);
        if path.exists() {
            let auth = base64::engine::general_purpose::STANDARD.encode(format!("{}:x", file.replace('/', "-")));
            fs::write(path, format!(r#"{{"auths":{{"{name}":{{"auth":"{auth}"}}}}}}"#)).unwrap();
        }
    }
    let (client, _) = client_with(quick(), "", CredentialStore::system(None)?);
    let _ = source(&client, &format!("{name}/a:b")).manifest(None);
    let basic = registry.requests().iter().find_map(|head| {
        let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with("authorization: basic "))?;
        line.rsplit(' ').next().map(str::to_owned)
    });
    let decode = |text: String| base64::engine::general_purpose::STANDARD.decode(text).unwrap();
    Ok(basic.map(|text| String::from_utf8(decode(text)).unwrap().trim_end_matches(":x").to_owned()))
}

/// In the order in which they are looked at, with variables of their own and without.
const AUTH_FILES: [&str; 6] = [
    "named.json",
    "run/containers/auth.json",
    "config/containers/auth.json",
    "docker/config.json",
    "home/.config/containers/auth.json",
    "home/.docker/config.json",
];

#[test]
fn an_auth_file_that_is_named_is_the_only_one() {
    let variables = [("REGISTRY_AUTH_FILE", "named.json"), ("XDG_RUNTIME_DIR", "run"), ("HOME", "home")];
    with_environment("environment::an_auth_file_that_is_named_is_the_only_one", &variables, |dir| {
        for file in AUTH_FILES {
            write(dir, file, "{}");
        }
        assert_eq!(user().unwrap().as_deref(), Some("named.json"));
        fs::remove_file(dir.join("named.json")).unwrap();
        let error = CredentialStore::system(None).unwrap_err();
        assert!(error.to_string().contains("named.json"), "{error}");
    });
}

#[test]
fn auth_files_are_found_by_their_variables() {
    let variables =
        [("XDG_RUNTIME_DIR", "run"), ("XDG_CONFIG_HOME", "config"), ("DOCKER_CONFIG", "docker"), ("HOME", "home")];
    with_environment("environment::auth_files_are_found_by_their_variables", &variables, |dir| {
        for file in AUTH_FILES {
            write(dir, file, "{}");
        }
        for file in &AUTH_FILES[1..4] {
            assert_eq!(user().unwrap(), Some(file.replace('/', "-")));
            fs::remove_file(dir.join(file)).unwrap();
        }
        // Those in the home directory are for the variables that are not set.
        assert_eq!(user().unwrap(), None);
        write(dir, "docker/config.json", "[");
        assert!(CredentialStore::system(None).unwrap_err().to_string().contains("docker/config.json"));
    });
}

#[test]
fn auth_files_are_found_in_the_home_directory() {
    with_environment("environment::auth_files_are_found_in_the_home_directory", &[("HOME", "home")], |dir| {
        assert_eq!(user().unwrap(), None);
        for file in AUTH_FILES {
            write(dir, file, "{}");
        }
        for file in &AUTH_FILES[4..] {
            assert_eq!(user().unwrap(), Some(file.replace('/', "-")));
            fs::remove_file(dir.join(file)).unwrap();
        }
        assert_eq!(user().unwrap(), None);
    });
}

/// Where `r.example` leads to.
fn leads_to() -> String {
    let name: ImageRef = "r.example/a:1".parse().unwrap();
    RegistriesConf::system(None).unwrap().resolve(&name).unwrap().pop().unwrap().reference.to_string()
}

fn conf(to: &str) -> String {
    format!("[[registry]]\nprefix = 'r.example'\nlocation = '{to}.example'\n")
}

#[test]
fn a_registries_conf_that_is_named_is_the_only_one() {
    let variables = [("CONTAINERS_REGISTRIES_CONF", "named.conf"), ("HOME", "home")];
    with_environment("environment::a_registries_conf_that_is_named_is_the_only_one", &variables, |dir| {
        write(dir, "named.conf", &conf("named"));
        write(dir, "home/.config/containers/registries.conf", &conf("home"));
        write(dir, "home/.config/containers/registries.conf.d/1.conf", &conf("drop-in"));
        assert_eq!(leads_to(), "named.example/a:1");
        write(dir, "given.conf", &conf("given"));
        let given = RegistriesConf::system(Some(&dir.join("given.conf"))).unwrap();
        let name: ImageRef = "r.example/a:1".parse().unwrap();
        assert_eq!(given.resolve(&name).unwrap().pop().unwrap().reference.to_string(), "given.example/a:1");
        fs::remove_file(dir.join("named.conf")).unwrap();
        assert!(RegistriesConf::system(None).unwrap_err().to_string().contains("named.conf"));
    });
}

#[test]
fn the_users_registries_conf_and_drop_ins_are_found() {
    let variables = [("XDG_CONFIG_HOME", "config"), ("HOME", "home")];
    with_environment("environment::the_users_registries_conf_and_drop_ins_are_found", &variables, |dir| {
        write(dir, "home/.config/containers/registries.conf", &conf("home"));
        write(dir, "config/containers/registries.conf", &conf("config"));
        assert_eq!(leads_to(), "config.example/a:1");
        write(dir, "config/containers/registries.conf.d/2.conf", &conf("second"));
        write(dir, "config/containers/registries.conf.d/1.conf", &conf("first"));
        write(dir, "config/containers/registries.conf.d/3.txt", "no configuration");
        assert_eq!(leads_to(), "second.example/a:1");
        write(dir, "config/containers/registries.conf.d/9.conf", "[[registry]]\nprefix = 1\n");
        assert!(RegistriesConf::system(None).unwrap_err().to_string().contains("9.conf"));
    });
}

#[test]
fn a_registries_conf_is_found_in_the_home_directory() {
    let test = "environment::a_registries_conf_is_found_in_the_home_directory";
    with_environment(test, &[("HOME", "home")], |dir| {
        write(dir, "home/.config/containers/registries.conf", &conf("home"));
        assert_eq!(leads_to(), "home.example/a:1");
    });
}
