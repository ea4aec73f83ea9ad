//! A PostgreSQL that is thrown away.

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{Tls, skip};

/// A cluster in a temporary directory, on a port of the loopback device and a socket beside it. As root, it runs as the user `postgres`.
#[derive(Debug)]
pub struct Postgres {
    programs: PathBuf,
    port: u16,
    directory: tempfile::TempDir,
}

impl Postgres {
    /// The user that owns it.
    pub const USER: &str = "nacre";

    /// Starts one that does not sync its disk; `None`, after a loud skip, where PostgreSQL is not installed. With `tls` it speaks TLS, too.
    pub fn start(tls: Option<&Tls>) -> Option<Self> {
        Self::start_with(tls, "fsync = off\n")
    }

    /// Starts one with settings of its own.
    pub fn start_with(tls: Option<&Tls>, settings: &str) -> Option<Self> {
        let Some(programs) = programs() else {
            skip("PostgreSQL is not installed (package postgresql)");
            return None;
        };
        let directory = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let cluster = Self { programs, port, directory };
        fs::set_permissions(cluster.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let data = cluster.directory.path().join("data");
        fs::create_dir(&data).unwrap();
        if rustix::process::geteuid().is_root() {
            cluster.run(Command::new("chown").arg("postgres").arg(&data));
        }
        cluster.run(
            cluster
                .owner("initdb")
                .arg("--no-sync")
                .args(["--auth=trust", "-E", "UTF8", "-U", Self::USER, "-D"])
                .arg(&data),
        );
        let mut config = fs::read_to_string(data.join("postgresql.conf")).unwrap();
        config.push_str(&format!(
            "listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = '{}'\n{settings}",
            data.display()
        ));
        if let Some(tls) = tls {
            for (from, to) in [(tls.certificate(), "server.crt"), (tls.key(), "server.key")] {
                fs::copy(from, data.join(to)).unwrap();
                fs::set_permissions(data.join(to), fs::Permissions::from_mode(0o600)).unwrap();
                if rustix::process::geteuid().is_root() {
                    cluster.run(Command::new("chown").arg("postgres").arg(data.join(to)));
                }
            }
            config.push_str("ssl = on\n");
        }
        fs::write(data.join("postgresql.conf"), config).unwrap();
        cluster.start_again();
        Some(cluster)
    }

    /// `postgresql://nacre@127.0.0.1:PORT/postgres`.
    pub fn url(&self) -> String {
        format!("postgresql://{}@127.0.0.1:{}/postgres", Self::USER, self.port)
    }

    /// The same by the socket in a directory.
    pub fn socket_url(&self) -> String {
        let directory = self.data().display().to_string().replace('/', "%2F");
        format!("postgresql://{}@{directory}:{}/postgres", Self::USER, self.port)
    }

    /// Ends it; what it acknowledged is there when it is started again.
    pub fn stop(&self) {
        self.run(self.owner("pg_ctl").args(["-m", "immediate", "-w", "stop", "-D"]).arg(self.data()));
    }

    /// Starts it again.
    pub fn start_again(&self) {
        let log = self.data().join("log");
        self.run(self.owner("pg_ctl").args(["-w", "start", "-l"]).arg(log).arg("-D").arg(self.data()));
    }

    /// Runs SQL, as its owner; gives what psql prints.
    pub fn sql(&self, sql: &str) -> String {
        let output = Command::new(self.programs.join("psql"))
            .args(["-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql])
            .arg(self.url())
            .output()
            .unwrap();
        assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// A program of PostgreSQL's, run by whom it may be run by.
    fn owner(&self, program: &str) -> Command {
        let program = self.programs.join(program);
        let mut command = match rustix::process::geteuid().is_root() {
            true => {
                let mut command = Command::new("runuser");
                command.args(["-u", "postgres", "--"]).arg(program);
                command
            }
            false => Command::new(program),
        };
        command.current_dir(self.directory.path());
        command
    }

    fn run(&self, command: &mut Command) {
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        let log = fs::read_to_string(self.data().join("log")).unwrap_or_default();
        assert!(status.success(), "{command:?}: {status}\n{log}");
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let mut stop = self.owner("pg_ctl");
        stop.args(["-m", "immediate", "stop", "-D"]).arg(self.data()).stdout(Stdio::null()).stderr(Stdio::null());
        let _ = stop.status();
    }
}

/// Where initdb and its like are: Debian keeps them out of PATH.
fn programs() -> Option<PathBuf> {
    let mut versions: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .collect();
    versions.sort();
    let path = std::env::var_os("PATH").unwrap_or_default();
    versions.into_iter().rev().chain(std::env::split_paths(&path)).find(|place: &PathBuf| has_initdb(place))
}

fn has_initdb(place: &Path) -> bool {
    place.join("initdb").is_file()
}
