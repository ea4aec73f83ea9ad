//! `nacre broker lease`, `anchor` and `enrolment`: what guests hold.

use nacre_broker::{AnchorInfo, Enrolment, Lease, Revocation};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::Admin;
use crate::{
    args::broker::{AnchorCommand, BrokerAt, EnrolmentCommand, LeaseCommand},
    exit::Missing,
    output,
};

fn time(seconds: i64) -> String {
    OffsetDateTime::from_unix_timestamp(seconds).ok().and_then(|time| time.format(&Rfc3339).ok()).unwrap_or_default()
}

pub(super) fn lease(command: &LeaseCommand) -> anyhow::Result<()> {
    match command {
        LeaseCommand::Ls { json, at } => {
            let leases = match Admin::of(at)? {
                Admin::Local(broker) => broker.leases("")?,
                Admin::Remote(client) => client.leases()?,
            };
            if *json {
                return output::json(&leases);
            }
            let now = OffsetDateTime::now_utc().unix_timestamp();
            let row = |lease: &Lease| {
                let state = match lease.revoked {
                    Some(since) => format!("revoked {}", time(since)),
                    None if lease.ends <= now => format!("ended {}", time(lease.ends)),
                    None => format!("until {}", time(lease.ends)),
                };
                let measurement = lease.measurement.chars().take(16).collect();
                vec![lease.name.clone(), lease.path.clone(), lease.version.to_string(), state, measurement]
            };
            let rows: Vec<Vec<String>> = leases.iter().map(row).collect();
            Ok(output::table(&["LEASE", "PATH", "VERSION", "STATE", "MEASUREMENT"], &rows)?)
        }
        LeaseCommand::Revoke { lease, resource, measurement, at } => {
            let revocation = match (lease, resource, measurement) {
                (_, Some(path), _) => Revocation::Resource(path.clone()),
                (_, _, Some(measurement)) => Revocation::Measurement(measurement.clone()),
                (lease, ..) => Revocation::Lease(lease.clone().unwrap_or_default()),
            };
            let count = match Admin::of(at)? {
                Admin::Local(broker) => broker.revoke(&revocation)?,
                Admin::Remote(client) => client.revoke(&revocation)?,
            };
            if count == 0 {
                return Err(Missing("there is no such lease, or none that has not ended".into()).into());
            }
            Ok(output::line(format_args!("{count} revoked"))?)
        }
    }
}

pub(super) fn anchor(command: &AnchorCommand) -> anyhow::Result<()> {
    match command {
        AnchorCommand::Ls { json, at } => {
            let anchors: Vec<AnchorInfo> = match Admin::of(at)? {
                Admin::Local(broker) => broker
                    .anchors("")?
                    .into_iter()
                    .map(|(name, state)| AnchorInfo { name, fence: state.fence, sequence: state.sequence })
                    .collect(),
                Admin::Remote(client) => client.anchors()?,
            };
            if *json {
                let of = |anchor: &AnchorInfo| json!({"name": anchor.name, "fence": anchor.fence, "sequence": anchor.sequence});
                return output::json(&anchors.iter().map(of).collect::<Vec<Value>>());
            }
            let row =
                |anchor: &AnchorInfo| vec![anchor.name.clone(), anchor.fence.to_string(), anchor.sequence.to_string()];
            let rows: Vec<Vec<String>> = anchors.iter().map(row).collect();
            Ok(output::table(&["NAME", "FENCE", "SEQUENCE"], &rows)?)
        }
        AnchorCommand::Rm { name, at } => {
            match Admin::of(at)? {
                Admin::Local(broker) => {
                    if !broker.delete_anchor(name)? {
                        return Err(Missing(format!("{name}: no such anchor")).into());
                    }
                }
                Admin::Remote(client) => client.delete_anchor(name)?,
            }
            Ok(())
        }
    }
}

pub(super) fn enrolment(command: &EnrolmentCommand) -> anyhow::Result<()> {
    match command {
        EnrolmentCommand::Ls { json, at } => {
            let found = match Admin::of(at)? {
                Admin::Local(broker) => broker.enrolments()?,
                Admin::Remote(client) => client.enrolments()?,
            };
            if *json {
                return output::json(&found);
            }
            let row = |tpm: &Enrolment| {
                let state = match tpm.revoked {
                    Some(since) => format!("revoked {}", time(since)),
                    None => format!("enrolled {}", time(tpm.enrolled)),
                };
                vec![tpm.name.clone(), tpm.issuer.clone(), state]
            };
            let rows: Vec<Vec<String>> = found.iter().map(row).collect();
            Ok(output::table(&["TPM", "EK CERTIFICATE BY", "STATE"], &rows)?)
        }
        EnrolmentCommand::Revoke { name, at } => revoke(name, false, at),
        EnrolmentCommand::Forget { name, at } => revoke(name, true, at),
    }
}

fn revoke(name: &str, forget: bool, at: &BrokerAt) -> anyhow::Result<()> {
    match Admin::of(at)? {
        Admin::Local(broker) => match broker.revoke_enrolment(name, forget)? {
            true => Ok(()),
            false => Err(Missing(format!("{name}: no such TPM")).into()),
        },
        Admin::Remote(client) => Ok(client.revoke_enrolment(name, forget)?),
    }
}
