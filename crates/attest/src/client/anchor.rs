//! The broker as an anchor: it remembers how far a volume has come, by compare and swap, for guests that its release policy lets.

use std::sync::Arc;

use nacre_core::{Anchor, AnchorError, AnchorState, ResourcePath};

use super::{BrokerClient, Call, ClientError, Credential, JSON, Reply, accept};
use crate::rcar::{AdvanceMessage, AnchorMessage, AnchorRefusal, LONGEST_STATE};

/// An anchor at a broker: `repository/name`.
pub struct BrokerAnchor {
    client: Arc<BrokerClient>,
    repository: String,
    name: String,
}

impl BrokerAnchor {
    /// The anchor of a name; nobody is asked yet.
    ///
    /// # Errors
    /// [`ClientError::Config`] for a name that is not `repository/name`.
    pub fn new(client: Arc<BrokerClient>, name: &str) -> Result<Self, ClientError> {
        let bad = || ClientError::Config(format!("'{name:.100}' names no anchor: write REPOSITORY/NAME"));
        let (repository, name) = name.split_once('/').ok_or_else(bad)?;
        ResourcePath::new(repository, "anchor", name).map_err(|_| bad())?;
        Ok(Self { client, repository: repository.to_owned(), name: name.to_owned() })
    }

    fn call(&self, call: Call<'_>) -> Result<Reply, ClientError> {
        let target = format!("/kbs/v0/anchor/{}/{}", self.repository, self.name);
        self.client.with_attestation(|attested| {
            let token = Credential::Bearer(attested.token());
            let reply = self.client.transport.call("anchor", &target, token, call, LONGEST_STATE)?;
            // A conflict is an answer.
            if reply.status == 409 { Ok(reply) } else { accept("anchor", reply) }
        })
    }

    fn failed(&self, what: &str, source: ClientError) -> AnchorError {
        AnchorError::Failed { anchor: self.describe(), what: what.into(), source: Arc::new(source) }
    }

    fn refused(&self, body: &[u8]) -> AnchorError {
        let malformed =
            || AnchorError::Untrusted { anchor: self.describe(), what: "the broker's refusal is none".into() };
        let Ok(refusal) = serde_json::from_slice::<AnchorRefusal>(body) else { return malformed() };
        if !refusal.kind.ends_with("/AnchorFenced") {
            return AnchorError::Untrusted {
                anchor: self.describe(),
                what: refusal.detail.chars().take(500).collect(),
            };
        }
        let state = AnchorMessage { state: refusal.state };
        let Ok(state) =
            serde_json::to_vec(&state).map_err(drop).and_then(|text| AnchorMessage::parse(&text).map_err(drop))
        else {
            return malformed();
        };
        match state {
            Some(found) => AnchorError::Fenced {
                anchor: self.describe(),
                found_fence: found.fence,
                found_sequence: found.sequence,
            },
            None => AnchorError::Untrusted {
                anchor: self.describe(),
                what: "the broker has no state of it any more: an administrator removed it".into(),
            },
        }
    }
}

impl Anchor for BrokerAnchor {
    fn read(&self) -> Result<Option<AnchorState>, AnchorError> {
        let read = self.client.retry(|| self.call(Call::Get)).and_then(|reply| {
            AnchorMessage::parse(&reply.body).map_err(|source| ClientError::Message { step: "anchor", source })
        });
        read.map_err(|error| self.failed("the broker did not say what it holds", error))
    }

    fn advance(&self, expected: Option<&AnchorState>, next: &AnchorState) -> Result<(), AnchorError> {
        let message = serde_json::to_vec(&AdvanceMessage::new(expected, next)).unwrap_or_default();
        let mut tries = 0;
        let reply = self.client.retry(|| {
            tries += 1;
            self.call(Call::Post(JSON, &message))
        });
        let reply = reply.map_err(|error| self.failed("the broker did not move it on", error))?;
        if reply.status != 409 {
            return Ok(());
        }
        // An earlier try may have done it, and only its answer was lost.
        match tries > 1 && self.read()?.as_ref() == Some(next) {
            true => Ok(()),
            false => Err(self.refused(&reply.body)),
        }
    }

    fn describe(&self) -> String {
        format!("anchor {}/{} of the key broker {}", self.repository, self.name, self.client.url())
    }

    fn promise(&self) -> String {
        format!(
            "an older copy of the disk is refused, as long as nobody turns back the database of the key broker at {}; two guests \
             cannot both write; while the broker does not answer, the disk cannot move its anchor on",
            self.client.url()
        )
    }
}

impl std::fmt::Debug for BrokerAnchor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.describe())
    }
}
