//! PostgreSQL, or a database that speaks its protocol and has serializable transactions (CockroachDB, YugabyteDB): several replicas of a broker
//! on one database, where each may serve every session.
//!
//! Plain SQL, no extensions: a table `nacre_<name>` (`key bytea PRIMARY KEY, value bytea`) for each [`Table`]. Changes are SERIALIZABLE
//! transactions that are run again on 40001 and 40P01. Reads are single statements. A connection that breaks is made again; while there is
//! none, calls fail with [`StorageError::Unavailable`], and whether a commit that broke was kept is for its caller to find out.

use std::{
    collections::HashMap,
    fmt::Write as _,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use postgres::{Client, Config, NoTls, Statement, config::SslMode, error::SqlState, types::ToSql};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use tokio_postgres_rustls::MakeRustlsConnect;
use zeroize::Zeroizing;

use super::{
    Change, Lane, Read, Storage, StorageError, Table, Tx, Writes,
    group::{Group, Writer},
    transaction::Rows,
};
use crate::BrokerError;

/// The schema, a step a version, taken for each table; a step is never changed, only followed by another one. The second one makes `guests`.
const STEPS: [&str; 2] = ["CREATE TABLE IF NOT EXISTS nacre_{} (key bytea PRIMARY KEY, value bytea NOT NULL)"; 2];
/// Connections for reading that are kept.
const MOST_IDLE: usize = 16;
const CONNECT_TIME: Duration = Duration::from_secs(5);
/// A statement takes this long at most.
const STATEMENT_TIME: Duration = Duration::from_secs(10);
/// For so long a call tries to connect again.
const PATIENCE: Duration = Duration::from_secs(3);
/// Tries of a transaction that meets others.
const MOST_TRIES: u32 = 100;

/// How the database is reached.
#[derive(Clone)]
pub(crate) struct Address {
    config: Config,
    tls: Option<MakeRustlsConnect>,
}

impl Address {
    /// Reads a URL `postgresql://…` or `postgres://…`. The password may be in a file of its own; `ca` are the certificates of who may sign
    /// the database's, the system's roots otherwise.
    pub(crate) fn parse(url: &str, password: Option<&PathBuf>, ca: Option<&PathBuf>) -> Result<Self, BrokerError> {
        let bad = |why: &str| BrokerError::Invalid(format!("database: {why}"));
        if !url.starts_with("postgresql://") && !url.starts_with("postgres://") {
            return Err(bad("write postgresql://USER@HOST/NAME"));
        }
        // The URL is not quoted: there may be a password in it.
        let mut config: Config = url.parse().map_err(|e: postgres::Error| bad(&format!("no PostgreSQL URL: {e}")))?;
        if let Some(path) = password {
            let text = std::fs::read_to_string(path)
                .map(Zeroizing::new)
                .map_err(|source| BrokerError::Io { path: path.clone(), source })?;
            config.password(text.trim_end_matches(['\n', '\r']));
        }
        let local = config.get_hosts().iter().all(|host| match host {
            postgres::config::Host::Unix(_) => true,
            postgres::config::Host::Tcp(name) => {
                name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
            }
        });
        if !local && config.get_ssl_mode() != SslMode::Require {
            return Err(bad("a database elsewhere is reached by TLS only: add sslmode=require to its URL"));
        }
        config.application_name("nacre-broker").connect_timeout(CONNECT_TIME).keepalives(true);
        config.keepalives_idle(Duration::from_secs(10)).tcp_user_timeout(STATEMENT_TIME);
        let tls = match config.get_ssl_mode() {
            SslMode::Disable => None,
            _ => Some(tls(ca)?),
        };
        Ok(Self { config, tls })
    }

    fn connect(&self) -> Result<Client, postgres::Error> {
        let mut client = match &self.tls {
            Some(tls) => self.config.connect(tls.clone()),
            None => self.config.connect(NoTls),
        }?;
        client.batch_execute(&format!("SET statement_timeout = {}", STATEMENT_TIME.as_millis()))?;
        Ok(client)
    }

    /// Without the password.
    fn describe(&self) -> String {
        let mut text = String::from("PostgreSQL at ");
        for (number, host) in self.config.get_hosts().iter().enumerate() {
            let port = self.config.get_ports().get(number).or(self.config.get_ports().first()).copied().unwrap_or(5432);
            let _ = match host {
                postgres::config::Host::Tcp(name) => write!(text, "{name}:{port} "),
                postgres::config::Host::Unix(path) => write!(text, "{}:{port} ", path.display()),
            };
        }
        text + self.config.get_dbname().unwrap_or_default()
    }
}

fn tls(ca: Option<&PathBuf>) -> Result<MakeRustlsConnect, BrokerError> {
    let fail = |e: &dyn std::fmt::Display| BrokerError::Tls(format!("database: {e}"));
    let mut roots = rustls::RootCertStore::empty();
    match ca {
        Some(path) => {
            let pem = std::fs::read(path).map_err(|source| BrokerError::Io { path: path.clone(), source })?;
            for certificate in CertificateDer::pem_slice_iter(&pem) {
                roots.add(certificate.map_err(|e| fail(&e))?).map_err(|e| fail(&e))?;
            }
        }
        None => drop(roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs)),
    }
    let config =
        rustls::ClientConfig::builder_with_provider(std::sync::Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|e| fail(&e))?
            .with_root_certificates(roots)
            .with_no_client_auth();
    Ok(MakeRustlsConnect::new(config))
}

fn failed(doing: &'static str) -> impl Fn(postgres::Error) -> StorageError {
    move |error| match error.code() {
        Some(code) if *code == SqlState::DISK_FULL || *code == SqlState::OUT_OF_MEMORY => {
            StorageError::Full { why: error.to_string() }
        }
        Some(code) if is_outage(code) => StorageError::Unavailable { why: error.to_string() },
        None => StorageError::Unavailable { why: source(&error) },
        Some(_) => StorageError::Failed { doing, source: std::sync::Arc::new(error) },
    }
}

/// What is behind "error connecting to server".
fn source(error: &postgres::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

/// Connection exceptions, too many connections, an administrator's shutdown, a recovering or read-only server.
fn is_outage(code: &SqlState) -> bool {
    code.code().starts_with("08") || code.code().starts_with("57P") || matches!(code.code(), "53300" | "25006")
}

fn is_conflict(error: &postgres::Error) -> bool {
    matches!(error.code().map(SqlState::code), Some("40001" | "40P01"))
}

/// A connection with its prepared statements.
struct Connection {
    client: Client,
    prepared: HashMap<String, Statement>,
}

impl Connection {
    fn new(client: Client) -> Self {
        Self { client, prepared: HashMap::new() }
    }

    fn prepare(&mut self, sql: String) -> Result<Statement, postgres::Error> {
        if let Some(statement) = self.prepared.get(&sql) {
            return Ok(statement.clone());
        }
        let statement = self.client.prepare(&sql)?;
        self.prepared.insert(sql, statement.clone());
        Ok(statement)
    }

    fn query(&mut self, sql: String, values: &[&(dyn ToSql + Sync)]) -> Result<Vec<postgres::Row>, postgres::Error> {
        let statement = self.prepare(sql)?;
        self.client.query(&statement, values)
    }

    fn execute(&mut self, sql: String, values: &[&(dyn ToSql + Sync)]) -> Result<u64, postgres::Error> {
        let statement = self.prepare(sql)?;
        self.client.execute(&statement, values)
    }

    fn apply(&mut self, writes: &Writes) -> Result<(), postgres::Error> {
        for table in Table::ALL {
            let (mut keys, mut values, mut gone) = (Vec::new(), Vec::new(), Vec::new());
            for (_, key, value) in writes.iter().filter(|(of, ..)| *of == table) {
                match value {
                    Some(value) => {
                        keys.push(key);
                        values.push(value);
                    }
                    None => gone.push(key),
                }
            }
            let table = table.name();
            if !keys.is_empty() {
                let sql = format!(
                    "INSERT INTO nacre_{table} (key, value) SELECT * FROM unnest($1::bytea[], $2::bytea[]) \
                     ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value"
                );
                self.execute(sql, &[&keys, &values])?;
            }
            if !gone.is_empty() {
                self.execute(format!("DELETE FROM nacre_{table} WHERE key = ANY($1::bytea[])"), &[&gone])?;
            }
        }
        Ok(())
    }
}

/// Reads; keeps the database's own error, which says whether it is worth another try.
struct Reader<'a> {
    connection: &'a mut Connection,
    error: Option<postgres::Error>,
}

impl Reader<'_> {
    fn query(&mut self, sql: String, values: &[&(dyn ToSql + Sync)]) -> Result<Vec<postgres::Row>, StorageError> {
        self.connection.query(sql, values).map_err(|error| {
            let said = StorageError::Unavailable { why: source(&error) };
            self.error = Some(error);
            said
        })
    }
}

/// The least key after all that begin with a prefix.
fn end_of(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return Some(end);
        }
    }
    None
}

impl Read for Reader<'_> {
    fn get(&mut self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StorageError> {
        let rows = self.query(format!("SELECT value FROM nacre_{} WHERE key = $1", table.name()), &[&key])?;
        Ok(rows.first().map(|row| row.get(0)))
    }

    fn list(&mut self, table: Table, prefix: &[u8], after: Option<&[u8]>, most: usize) -> Result<Rows, StorageError> {
        let (most, after) = (i64::try_from(most).unwrap_or(i64::MAX), after.map(<[u8]>::to_vec));
        let sql = format!(
            "SELECT key, value FROM nacre_{} WHERE key >= $1 AND ($2::bytea IS NULL OR key < $2) \
             AND ($3::bytea IS NULL OR key > $3) ORDER BY key LIMIT $4",
            table.name()
        );
        let rows = self.query(sql, &[&prefix, &end_of(prefix), &after, &most])?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    fn count(&mut self, table: Table) -> Result<usize, StorageError> {
        let rows = self.query(format!("SELECT count(*) FROM nacre_{}", table.name()), &[])?;
        let count: i64 = rows.first().map_or(0, |row| row.get(0));
        Ok(usize::try_from(count).unwrap_or_default())
    }
}

/// The storage of a broker with replicas.
pub(crate) struct Postgres {
    address: Address,
    idle: Mutex<Vec<Connection>>,
    log: Group,
    sessions: Group,
}

impl Postgres {
    /// Connects, and makes or migrates the tables.
    pub(crate) fn open(address: Address) -> Result<Self, BrokerError> {
        let mut client = connect(&address)?;
        migrate(&mut client)?;
        let writer = |lane| PostgresWriter { address: address.clone(), connection: None, lane };
        Ok(Self {
            log: Group::start("nacre-log", writer(Lane::Log))?,
            sessions: Group::start("nacre-session", writer(Lane::Sessions))?,
            idle: Mutex::new(vec![Connection::new(client)]),
            address,
        })
    }

    fn take(&self) -> Option<Connection> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    fn put_back(&self, connection: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MOST_IDLE && !connection.client.is_closed() {
            idle.push(connection);
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // A connection's end waits for its runtime, which a thread that drives another runtime may not.
        let idle = std::mem::take(&mut *self.idle.lock().unwrap_or_else(PoisonError::into_inner));
        if let Ok(thread) = std::thread::Builder::new().spawn(move || drop(idle)) {
            let _ = thread.join();
        }
    }
}

/// Connects within the patience of a call.
fn connect(address: &Address) -> Result<Client, StorageError> {
    let start = Instant::now();
    loop {
        match address.connect() {
            Ok(client) => return Ok(client),
            Err(error) if error.code().is_some_and(|code| !is_outage(code)) => return Err(failed("connect")(error)),
            Err(error) if start.elapsed() >= PATIENCE => return Err(StorageError::Unavailable { why: source(&error) }),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn migrate(client: &mut Client) -> Result<(), BrokerError> {
    // Replicas may start together: making a table that another one is making fails with one of several codes, and is tried again.
    for attempt in 0.. {
        match try_migrate(client) {
            Ok(version) if version <= STEPS.len() => return Ok(()),
            Ok(version) => {
                return Err(BrokerError::Damaged {
                    what: "its schema".into(),
                    why: format!("version {version}, of which this broker knows {}: a newer one was here", STEPS.len()),
                });
            }
            Err(error) if attempt < 20 && error.code().is_some() => {
                tracing::debug!(%error, "migration meets another one");
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(error) => return Err(failed("migrate")(error).into()),
        }
    }
    Ok(())
}

fn try_migrate(client: &mut Client) -> Result<usize, postgres::Error> {
    client.batch_execute("CREATE TABLE IF NOT EXISTS nacre_schema (version bigint PRIMARY KEY)")?;
    let version: i64 = client.query_one("SELECT COALESCE(MAX(version), 0) FROM nacre_schema", &[])?.get(0);
    let done = usize::try_from(version).unwrap_or_default();
    for (number, step) in STEPS.iter().enumerate().skip(done) {
        for table in Table::ALL {
            client.batch_execute(&step.replace("{}", table.name()))?;
        }
        let version = i64::try_from(number + 1).unwrap_or(i64::MAX);
        client.execute("INSERT INTO nacre_schema (version) VALUES ($1) ON CONFLICT DO NOTHING", &[&version])?;
        tracing::info!(version, "the database has a new schema");
    }
    Ok(done.max(STEPS.len()))
}

impl Storage for Postgres {
    fn view(&self, look: &mut dyn FnMut(&mut Tx<'_>) -> Result<(), BrokerError>) -> Result<(), BrokerError> {
        let start = Instant::now();
        loop {
            let mut connection = match self.take() {
                Some(connection) => connection,
                None => Connection::new(connect(&self.address)?),
            };
            let mut reader = Reader { connection: &mut connection, error: None };
            let looked = look(&mut Tx::new(&mut reader, None));
            match (looked, reader.error) {
                (looked, None) => {
                    self.put_back(connection);
                    return looked;
                }
                // A connection that was idle while the database was restarted, or a read that met something.
                (_, Some(error)) if start.elapsed() < PATIENCE && worth_another_try(&error) => {}
                (_, Some(error)) => return Err(failed("read")(error).into()),
            }
        }
    }

    fn update(&self, lane: Lane, change: Change) -> Result<(), BrokerError> {
        match lane {
            Lane::Log => self.log.update(change),
            Lane::Sessions => self.sessions.update(change),
        }
    }

    fn is_shared(&self) -> bool {
        true
    }

    fn describe(&self) -> String {
        self.address.describe()
    }
}

fn worth_another_try(error: &postgres::Error) -> bool {
    is_conflict(error) || error.code().is_none_or(is_outage)
}

struct PostgresWriter {
    address: Address,
    connection: Option<Connection>,
    lane: Lane,
}

/// How far a try came.
enum Tried {
    Committed,
    /// Nothing was kept.
    Again(postgres::Error),
    /// COMMIT was sent and not answered.
    Unknown(postgres::Error),
    /// A change said no.
    No(StorageError),
}

impl PostgresWriter {
    fn attempt(
        connection: &mut Connection,
        lane: Lane,
        changes: &mut dyn FnMut(&mut dyn Read) -> Result<Writes, StorageError>,
    ) -> Tried {
        if let Err(error) = connection.client.batch_execute("BEGIN ISOLATION LEVEL SERIALIZABLE") {
            return Tried::Again(error);
        }
        if lane == Lane::Log {
            // Replicas that append to the log take turns here, before they have done any work, instead of undoing it afterwards.
            let head =
                connection.query("SELECT key FROM nacre_meta WHERE key = $1 FOR UPDATE".into(), &[&&b"audit"[..]]);
            if let Err(error) = head {
                return Tried::Again(error);
            }
        }
        let mut reader = Reader { connection, error: None };
        let writes = match (changes(&mut reader), reader.error.take()) {
            (_, Some(error)) => return Tried::Again(error),
            (Err(error), None) => return Tried::No(error),
            (Ok(writes), None) => writes,
        };
        if let Err(error) = connection.apply(&writes) {
            return Tried::Again(error);
        }
        match connection.client.batch_execute("COMMIT") {
            Ok(()) => Tried::Committed,
            Err(error) if is_conflict(&error) => Tried::Again(error),
            Err(error) => Tried::Unknown(error),
        }
    }
}

impl Writer for PostgresWriter {
    fn commit(
        &mut self,
        changes: &mut dyn FnMut(&mut dyn Read) -> Result<Writes, StorageError>,
    ) -> Result<(), StorageError> {
        let start = Instant::now();
        for attempt in 1..=MOST_TRIES {
            let mut connection = match self.connection.take().filter(|connection| !connection.client.is_closed()) {
                Some(connection) => connection,
                None => Connection::new(connect(&self.address)?),
            };
            let tried = Self::attempt(&mut connection, self.lane, changes);
            match tried {
                Tried::Committed => {
                    self.connection = Some(connection);
                    return Ok(());
                }
                Tried::Unknown(error) => return Err(failed("commit")(error)),
                Tried::No(error) => {
                    let _ = connection.client.batch_execute("ROLLBACK").map(|()| self.connection = Some(connection));
                    return Err(error);
                }
                Tried::Again(error) => {
                    let conflict = is_conflict(&error);
                    let again = conflict || (worth_another_try(&error) && start.elapsed() < PATIENCE);
                    let _ = connection.client.batch_execute("ROLLBACK").map(|()| self.connection = Some(connection));
                    if !again {
                        return Err(failed("write")(error));
                    }
                    if conflict && attempt > 3 {
                        std::thread::sleep(Duration::from_millis(u64::from(attempt.min(20))));
                    }
                }
            }
        }
        Err(StorageError::Conflict { tries: MOST_TRIES })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_elsewhere_needs_tls() {
        let parse = |url: &str| Address::parse(url, None, None).map(|address| address.describe());
        assert_eq!(parse("postgresql://me@localhost/broker").unwrap(), "PostgreSQL at localhost:5432 broker");
        assert_eq!(
            parse("postgres://me:pw@127.0.0.1:6000/b?sslmode=disable").unwrap(),
            "PostgreSQL at 127.0.0.1:6000 b"
        );
        assert!(parse("postgresql://me@%2Frun%2Fpg/broker").is_ok());
        assert!(parse("postgresql://me@db.example/broker?sslmode=require").is_ok());
        for bad in [
            "postgresql://me@db.example/broker",
            "postgresql://me@db.example/broker?sslmode=disable",
            "postgresql://me@localhost,db.example/broker?sslmode=prefer",
            "mysql://x",
            "",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        let error = parse("postgresql://me:hunter2@db.example/broker").unwrap_err().to_string();
        assert!(error.contains("sslmode=require") && !error.contains("hunter2"), "{error}");
    }

    #[test]
    fn the_end_of_a_prefix() {
        assert_eq!(end_of(b"a"), Some(b"b".to_vec()));
        assert_eq!(end_of(b"a\xff\xff"), Some(b"b".to_vec()));
        assert_eq!((end_of(b""), end_of(b"\xff")), (None, None));
    }
}
