//! `nacre broker admin`.

use anyhow::Context as _;
use nacre_broker::{Administrator, Role};

use super::{Admin, read};
use crate::{
    args::broker::{AdminCommand, RoleArg},
    exit::Missing,
    output,
};

pub(super) fn admin(command: &AdminCommand) -> anyhow::Result<()> {
    match command {
        AdminCommand::Add { name, key, role, repository, at } => {
            let pem = read(key)?;
            let pem =
                std::str::from_utf8(pem.expose()).with_context(|| format!("{}: not a PEM file", key.display()))?;
            let role = match role {
                RoleArg::Admin => Role::Admin,
                RoleArg::Operator => Role::Operator,
                RoleArg::Auditor => Role::Auditor,
            };
            let admin = Administrator { name: name.clone(), role, repository: repository.clone(), key: pem.to_owned() };
            match Admin::of(at)? {
                Admin::Local(broker) => Ok(broker.set_admin(&admin)?),
                Admin::Remote(client) => Ok(client.set_admin(&admin)?),
            }
        }
        AdminCommand::Ls { json, at } => {
            let admins = match Admin::of(at)? {
                Admin::Local(broker) => broker.admins()?,
                Admin::Remote(client) => client.admins()?,
            };
            if *json {
                return output::json(&admins);
            }
            let row = |admin: &Administrator| {
                vec![admin.name.clone(), admin.role.name().into(), admin.repository.clone().unwrap_or_default()]
            };
            let rows: Vec<Vec<String>> = admins.iter().map(row).collect();
            Ok(output::table(&["NAME", "ROLE", "REPOSITORY"], &rows)?)
        }
        AdminCommand::Rm { name, at } => {
            match Admin::of(at)? {
                Admin::Local(broker) => {
                    if !broker.delete_admin(name)? {
                        return Err(Missing(format!("{name}: no such administrator")).into());
                    }
                }
                Admin::Remote(client) => client.delete_admin(name)?,
            }
            Ok(())
        }
    }
}
