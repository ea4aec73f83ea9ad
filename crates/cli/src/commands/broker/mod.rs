//! `nacre broker`: make one, serve guests, administer it (while it runs, by its HTTP service; otherwise, by its files).

mod admins;
mod audit;
mod guests;
mod master;
mod policy_test;
mod reference;
mod tenure;
mod vault;

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use nacre_attest::client::BrokerConfig;
use nacre_broker::{
    AdminClient, Broker, InitOptions, PutOptions, Resource, ResourceKind, ResourceScope, Settings, Transport,
    admin_token, serve,
};
use nacre_core::{
    ResourcePath, SecretBytes,
    jose::{PrivateKey, PublicKey},
};
use nacre_sys::end::EndSignals;

use crate::{
    args::{
        CollateralCommand,
        broker::{AuditCommand, BrokerAt, BrokerCommand, PolicyCommand, ResourceCommand},
    },
    commands::verify,
    exit::Missing,
    output,
};

/// The most bytes of a secret or a policy file.
const FILE_LIMIT: u64 = 4 << 20;

pub(crate) fn broker(command: &BrokerCommand) -> anyhow::Result<()> {
    match command {
        BrokerCommand::Init {
            dir,
            allow_simulated,
            name,
            database,
            database_password_file,
            database_ca,
            master_key,
        } => {
            let absolute = |path: &Option<PathBuf>| path.as_ref().map(std::path::absolute).transpose();
            let settings = Settings {
                allow_simulated: *allow_simulated,
                database: database.clone(),
                database_password_file: absolute(database_password_file)?,
                database_ca: absolute(database_ca)?,
                master_key: master_key.clone(),
                ..Settings::default()
            };
            init(dir, settings, name)
        }
        BrokerCommand::Serve { dir, listen, insecure_http } => {
            let end = EndSignals::hold()?;
            let transport = if *insecure_http { Transport::PlainHttp } else { Transport::Tls };
            let handle = serve(Arc::new(Broker::open_with(dir, &master::open)?), *listen, transport)?;
            output::line(format_args!("serving at {}", handle.url()))?;
            end.wait()?;
            handle.shutdown();
            Ok(())
        }
        BrokerCommand::Master(command) => master::master(command),
        BrokerCommand::Resource(command) => resource(command),
        BrokerCommand::Policy(command) => policy(command),
        BrokerCommand::Reference(command) => reference::reference(command),
        BrokerCommand::TrustSim { file, at } => {
            let key = PublicKey::from_bytes(read(file)?.expose()).with_context(|| format!("{}", file.display()))?;
            match Admin::of(at)? {
                Admin::Local(broker) => Ok(broker.add_sim_platform_key(&key)?),
                Admin::Remote(client) => Ok(client.add_sim_platform_key(&key)?),
            }
        }
        BrokerCommand::Collateral(CollateralCommand::Import { files, dir }) => verify::import_collateral(dir, files),
        BrokerCommand::Collateral(CollateralCommand::Ls { json, dir }) => verify::list_collateral(dir, *json),
        BrokerCommand::Token { seconds, at } => {
            Ok(output::line(admin_token(&at.admin_key()?, &at.token_key()?, &subject(), *seconds)?)?)
        }
        BrokerCommand::Audit { command: None, json, after, at } => audit::show(*json, *after, at),
        BrokerCommand::Audit { command: Some(AuditCommand::Verify { head, json, at }), .. } => {
            audit::verify(head.as_deref(), *json, at)
        }
        BrokerCommand::Lease(command) => tenure::lease(command),
        BrokerCommand::Guest(command) => guests::guest(command),
        BrokerCommand::Anchor(command) => tenure::anchor(command),
        BrokerCommand::Enrolment(command) => tenure::enrolment(command),
        BrokerCommand::Admin(command) => admins::admin(command),
        BrokerCommand::RotateTokenKey { at } => {
            let pem = match Admin::of(at)? {
                Admin::Local(broker) => broker.rotate_token_key()?.to_pem()?,
                Admin::Remote(client) => client.rotate_token_key()?,
            };
            Ok(output::line(pem.trim_end())?)
        }
    }
}

fn init(dir: &Path, settings: Settings, names: &[String]) -> anyhow::Result<()> {
    Broker::init_with(dir, &InitOptions { names: names.to_vec(), settings }, &master::open)?;
    for (file, what) in [
        ("tls.crt", "pin it in guests (--broker-cert)"),
        ("token.pub", "pin it in guests (--broker-token-key)"),
        ("admin.key", "the administrator's: move it to where you administer from"),
        ("broker.toml", "settings"),
    ] {
        output::line(format_args!("{:<40} {what}", dir.join(file).display()))?;
    }
    Ok(())
}

/// A broker to be administered.
enum Admin {
    Local(Box<Broker>),
    Remote(Box<AdminClient>),
}

impl Admin {
    fn of(at: &BrokerAt) -> anyhow::Result<Self> {
        let Some(url) = &at.url else { return Ok(Self::Local(Box::new(Broker::open_with(&at.dir, &master::open)?))) };
        let certificate = at.cert.clone().unwrap_or_else(|| at.dir.join("tls.crt"));
        let pem = std::fs::read_to_string(&certificate)
            .with_context(|| format!("{}: the broker's certificate", certificate.display()))?;
        let mut config = BrokerConfig::new(url).pin(Some(&pem), None)?;
        config.token_key = Some(at.token_key()?);
        Ok(Self::Remote(Box::new(AdminClient::new(&config, at.admin_key()?, &subject())?)))
    }
}

impl BrokerAt {
    fn admin_key(&self) -> anyhow::Result<PrivateKey> {
        let path = self.admin_key.clone().unwrap_or_else(|| self.dir.join("admin.key"));
        PrivateKey::from_bytes(read(&path)?.expose())
            .with_context(|| format!("{}: the administrator's key", path.display()))
    }

    fn token_key(&self) -> anyhow::Result<PublicKey> {
        let path = self.token_key.clone().unwrap_or_else(|| self.dir.join("token.pub"));
        PublicKey::from_bytes(read(&path)?.expose())
            .with_context(|| format!("{}: the broker's token key", path.display()))
    }
}

/// Who administers, for the audit log.
fn subject() -> String {
    std::env::var("USER").ok().filter(|user| !user.is_empty()).unwrap_or_else(|| "admin".into())
}

fn read(path: &Path) -> anyhow::Result<SecretBytes> {
    let mut bytes = Vec::new();
    let result = match path == Path::new("-") {
        true => std::io::stdin().take(FILE_LIMIT + 1).read_to_end(&mut bytes),
        false => std::fs::File::open(path).and_then(|file| file.take(FILE_LIMIT + 1).read_to_end(&mut bytes)),
    };
    result.with_context(|| format!("{}: read", path.display()))?;
    anyhow::ensure!(bytes.len() as u64 <= FILE_LIMIT, "{}: larger than {FILE_LIMIT} bytes", path.display());
    Ok(SecretBytes::new(bytes))
}

fn resource(command: &ResourceCommand) -> anyhow::Result<()> {
    match command {
        ResourceCommand::Put { path, file, kind, lease, at } => {
            let (path, value): (ResourcePath, _) = (path.parse()?, read(file)?);
            let kind = kind.as_deref().map(ResourceKind::from_name).transpose()?;
            let options = PutOptions { kind, lease_seconds: *lease };
            match Admin::of(at)? {
                Admin::Local(broker) => broker.put_resource_with(&path, value.expose(), options)?,
                Admin::Remote(client) => client.put_resource_with(&path, value.expose(), options)?,
            };
            Ok(())
        }
        ResourceCommand::Rotate { path, at } => {
            let path: ResourcePath = path.parse()?;
            let version = match Admin::of(at)? {
                Admin::Local(broker) => broker.rotate_resource(&path)?,
                Admin::Remote(client) => client.rotate_resource(&path)?,
            };
            Ok(output::line(format_args!("version {version}"))?)
        }
        ResourceCommand::Rm { path, at } => {
            let path: ResourcePath = path.parse()?;
            match Admin::of(at)? {
                Admin::Local(broker) => {
                    if !broker.delete_resource(&path)? {
                        return Err(Missing(format!("{path}: no such resource")).into());
                    }
                }
                Admin::Remote(client) => client.delete_resource(&path)?,
            }
            Ok(())
        }
        ResourceCommand::Ls { long, json, at } => {
            let found = match Admin::of(at)? {
                Admin::Local(broker) => broker.resource_list("")?,
                Admin::Remote(client) => client.resources()?,
            };
            if *json {
                return output::json(&found);
            }
            if !long {
                return Ok(found.iter().try_for_each(|resource| output::line(&resource.path))?);
            }
            let row = |resource: &Resource| {
                let lease = resource.lease_seconds.map(|seconds| format!("{seconds} s")).unwrap_or_default();
                vec![resource.path.clone(), resource.kind.name().into(), resource.version.to_string(), lease]
            };
            let rows: Vec<Vec<String>> = found.iter().map(row).collect();
            Ok(output::table(&["PATH", "KIND", "VERSION", "LEASE"], &rows)?)
        }
    }
}

fn policy(command: &PolicyCommand) -> anyhow::Result<()> {
    let text = |file: &PathBuf| {
        let bytes = read(file)?;
        let text = std::str::from_utf8(bytes.expose()).with_context(|| format!("{}: not UTF-8", file.display()))?;
        anyhow::Ok(text.to_owned())
    };
    match command {
        PolicyCommand::SetAttestation { file, tee, at } => match Admin::of(at)? {
            Admin::Local(broker) => Ok(broker.set_attestation_policy(&format!("{tee}_cpu"), &text(file)?)?),
            Admin::Remote(client) => Ok(client.set_attestation_policy(&format!("{tee}_cpu"), &text(file)?)?),
        },
        PolicyCommand::ShowAttestation { tee, at } => {
            let id = format!("{tee}_cpu");
            let policy = match Admin::of(at)? {
                Admin::Local(broker) => {
                    let missing = || Missing(format!("there is no attestation policy {id}"));
                    broker.attestation_policy(&id)?.ok_or_else(missing)?
                }
                Admin::Remote(client) => client.attestation_policy(&id)?,
            };
            Ok(output::line(policy.trim_end())?)
        }
        PolicyCommand::Test { token, resource, policy, json, at } => {
            policy_test::test(token, resource.as_deref(), policy.as_deref(), *json, at)
        }
        PolicyCommand::SetResource { file, scope, at } => match Admin::of(at)? {
            Admin::Local(broker) => Ok(broker.set_resource_policy(scope, &text(file)?)?),
            Admin::Remote(client) => {
                Ok(with_scope(scope, |scope| Ok(client.set_resource_policy(scope, &text(file)?)?))?)
            }
        },
        PolicyCommand::RmResource { scope, at } => {
            match Admin::of(at)? {
                Admin::Local(broker) => {
                    if !broker.delete_resource_policy(scope)? {
                        return Err(Missing("there is no policy of exactly this scope".into()).into());
                    }
                }
                Admin::Remote(client) => with_scope(scope, |scope| Ok(client.delete_resource_policy(scope)?))?,
            }
            Ok(())
        }
        PolicyCommand::ShowResource { scope, at } => {
            let policy = match Admin::of(at)? {
                Admin::Local(broker) => {
                    let missing = || Missing("there is no policy of exactly this scope".into());
                    broker.resource_policy(scope)?.ok_or_else(missing)?
                }
                Admin::Remote(client) => with_scope(scope, |scope| Ok(client.resource_policy(scope)?))?,
            };
            Ok(output::line(policy.trim_end())?)
        }
    }
}

/// Reads a scope: nothing, a repository, or a whole path.
fn with_scope<T>(text: &str, act: impl FnOnce(&ResourceScope<'_>) -> anyhow::Result<T>) -> anyhow::Result<T> {
    match text.matches('/').count() {
        0 if text.is_empty() => act(&ResourceScope::All),
        0 => act(&ResourceScope::Repository(text)),
        _ => act(&ResourceScope::Resource(&text.parse()?)),
    }
}
