//! Resources that are lent: a guest has to renew its lease, by attesting again, or to give the resource up.

use std::{fmt, sync::Arc, time::Duration};

use nacre_core::{ResourcePath, SecretBytes, jose::Jwe};

use super::{Attested, BrokerClient, Call, ClientError, Credential, JSON, LONGEST_RESOURCE, accept, time::BootTime};
use crate::rcar::{LONGEST_STATE, LeaseReply};

/// A resource as it was released.
pub struct Borrowed {
    /// The secret.
    pub secret: SecretBytes,
    /// Its version, where the broker says so.
    pub version: Option<u32>,
    /// Its lease; `None` where it is given for good.
    pub lease: Option<Lease>,
}

impl fmt::Debug for Borrowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Borrowed").field("version", &self.version).field("lease", &self.lease).finish_non_exhaustive()
    }
}

/// The right to a resource, until it ends.
pub struct Lease {
    path: ResourcePath,
    id: String,
    seconds: u32,
    /// Since when: an instant before the broker granted or renewed it, so that it ends here no later than there.
    since: BootTime,
    /// The attestation that it was granted or renewed by.
    by: Arc<Attested>,
}

impl Lease {
    /// What is lent.
    pub fn path(&self) -> &ResourcePath {
        &self.path
    }

    /// For how many seconds at a time.
    pub fn seconds(&self) -> u32 {
        self.seconds
    }

    /// How much of it is left.
    pub fn left(&self) -> Duration {
        Duration::from_secs(self.seconds.into()).saturating_sub(self.since.elapsed())
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Its id is what renews it.
        f.debug_struct("Lease").field("path", &self.path).field("seconds", &self.seconds).finish_non_exhaustive()
    }
}

/// Trustee has no word of its own for a resource that is not there.
fn explained(mut error: ClientError) -> ClientError {
    if let ClientError::Refused { status: 401, kind, detail, .. } = &mut error
        && kind == "PluginInternalError"
    {
        detail.push_str(" (Trustee says no more where there is no such resource: does its path exist there?)");
    }
    error
}

impl BrokerClient {
    /// Fetches a resource with its lease; a version of it where one is named, the current one otherwise.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn borrow(&self, path: &ResourcePath, version: Option<u32>) -> Result<Borrowed, ClientError> {
        self.measure_key(path)?;
        self.with_attestation(|attested| self.borrow_with(attested, path, version))
    }

    /// Does something with an attestation, and once more with a new one when the broker does not know the first any more.
    pub(super) fn with_attestation<T>(
        &self,
        act: impl Fn(&Arc<Attested>) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        let attested = self.attest()?;
        match act(&attested) {
            Err(error) if error.is_unauthorized() => {
                tracing::info!(%error, "attesting again");
                act(&self.attest_unless(|current| !Arc::ptr_eq(current, &attested))?)
            }
            other => other,
        }
    }

    pub(super) fn borrow_with(
        &self,
        attested: &Arc<Attested>,
        path: &ResourcePath,
        version: Option<u32>,
    ) -> Result<Borrowed, ClientError> {
        let version = version.map(|number| format!("?version={number}")).unwrap_or_default();
        let (reply, since) = self.retry(|| {
            let since = BootTime::now();
            let target = format!("/kbs/v0/resource/{path}{version}");
            let token = Credential::Bearer(&attested.token);
            let reply = self.transport.call("resource", &target, token, Call::Get, LONGEST_RESOURCE)?;
            Ok((accept("resource", reply).map_err(explained)?, since))
        })?;
        let fail = |source| ClientError::Decrypt { path: path.clone(), source };
        let secret = Jwe::parse(&reply.body).map_err(fail)?.decrypt_with([&attested.tee_key]).map_err(fail)?;
        let lease =
            reply.lease.map(|(id, seconds)| Lease { path: path.clone(), id, seconds, since, by: attested.clone() });
        Ok(Borrowed { secret, version: reply.version, lease })
    }

    /// Renews a lease: attests anew, unless that was done since it was renewed last, and shows that.
    ///
    /// # Errors
    /// [`ClientError::LeaseEnded`] when the broker says no, or it ran out meanwhile; any other error may be tried again until it ends.
    pub fn renew(&self, lease: &mut Lease) -> Result<(), ClientError> {
        let ended = |why: String| ClientError::LeaseEnded { path: lease.path.clone(), why };
        if lease.left().is_zero() {
            return Err(ended("it ran out".into()));
        }
        let attested = self.attest_unless(|current| !Arc::ptr_eq(current, &lease.by) && current.is_fresh());
        let attested = attested.map_err(|error| match error.is_final() {
            true => ended(format!("this guest is not attested any more: {error}")),
            false => error,
        })?;
        let since = BootTime::now();
        let target = format!("/kbs/v0/lease/{}", lease.id);
        let credential = Credential::Bearer(&attested.token);
        let reply = self.transport.call("lease", &target, credential, Call::Post(JSON, b"{}"), LONGEST_STATE)?;
        let reply = accept("lease", reply).map_err(|error| match error.is_final() {
            true => ended(error.to_string()),
            false => error,
        })?;
        let renewed =
            LeaseReply::parse(&reply.body).map_err(|source| ClientError::Message { step: "lease", source })?;
        (lease.seconds, lease.since, lease.by) = (renewed.seconds, since, attested);
        Ok(())
    }

    /// Ends a lease that is not needed any more.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn give_up(&self, lease: &Lease) -> Result<(), ClientError> {
        let target = format!("/kbs/v0/lease/{}", lease.id);
        self.with_attestation(|attested| {
            let token = Credential::Bearer(&attested.token);
            accept("lease", self.transport.call("lease", &target, token, Call::Delete, LONGEST_STATE)?).map(drop)
        })
    }
}
