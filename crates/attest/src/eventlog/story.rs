//! What the run-time events of a guest say together.
//!
//! | domain | operation | content |
//! |---|---|---|
//! | `github.com/nacre-storage/nacre` | `InitData` | `{"digest"}`: hex, of the init data |
//! | | `Policy` | `{"digest"}`: `sha256:…` of the image policy that is used from now on |
//! | | `ImageAdmitted` | `{"digest","image","signers"}`: the manifest, the name asked for, who vouched |
//! | | `VolumeOpened` | `{"anchor","id","protection","root"}` |
//! | | `KeyReleased` | `{"resource"}`: the path at the broker, not the key |
//! | | `WorkloadStarted` | `{"digest","id"}`: the image's manifest, the container |
//! | `github.com/confidential-containers` | `PullImage` | `{"digest","image"}`: what other brokers' policies look for |

use nacre_core::Digest;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{LogError, aael::RuntimeEvent};
use crate::jcs;

/// The domain of our own operations.
pub const DOMAIN: &str = "github.com/nacre-storage/nacre";
/// The domain that other guests' agents use.
pub const COCO_DOMAIN: &str = "github.com/confidential-containers";
/// Entries of each kind that a token carries; policies see all.
const MOST_IN_TOKENS: usize = 8;

/// Something that a guest did, and measured before it did it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happening {
    /// It was started with this init data.
    InitData {
        /// The digest, hex.
        digest: String,
    },
    /// From now on images are admitted by this policy.
    Policy {
        /// Of the policy's text.
        digest: Digest,
    },
    /// An image was admitted.
    ImageAdmitted(Image),
    /// A volume was opened.
    VolumeOpened(Volume),
    /// A key is asked for at the broker.
    KeyReleased {
        /// Its path.
        resource: String,
    },
    /// A container is started.
    WorkloadStarted {
        /// The container.
        id: String,
        /// Its image's manifest.
        digest: String,
    },
}

/// An image that was admitted.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// The digest of its manifest.
    pub digest: String,
    /// The name that was asked for.
    pub image: String,
    /// Who vouched for it: key ids, or what else the policy was satisfied by.
    pub signers: Vec<String>,
}

/// A volume that was opened.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// Where rollbacks are seen: `tpm`, `broker`, `file`, `none`; `ephemeral` for one whose key never leaves memory.
    pub anchor: String,
    /// Its name.
    pub id: String,
    /// What protects it: `disk`, `fs`, `verity`, `luks2`, `lazy`, `external`.
    pub protection: String,
    /// What its content is verified against; empty where there is nothing yet.
    pub root: String,
}

impl Happening {
    /// As events of a log, in this order.
    ///
    /// # Errors
    /// [`LogError`]: a name that no event can have.
    pub fn events(&self) -> Result<Vec<RuntimeEvent>, LogError> {
        let ours = |operation: &str, content: Value| event(DOMAIN, operation, &content);
        Ok(match self {
            Self::InitData { digest } => vec![ours("InitData", json!({"digest": digest}))?],
            Self::Policy { digest } => vec![ours("Policy", json!({"digest": digest.to_string()}))?],
            Self::ImageAdmitted(image) => {
                let Image { digest, image: name, signers } = image;
                vec![
                    event(COCO_DOMAIN, "PullImage", &json!({"digest": digest, "image": name}))?,
                    ours("ImageAdmitted", json!({"digest": digest, "image": name, "signers": signers}))?,
                ]
            }
            Self::VolumeOpened(Volume { anchor, id, protection, root }) => {
                let content = json!({"anchor": anchor, "id": id, "protection": protection, "root": root});
                vec![ours("VolumeOpened", content)?]
            }
            Self::KeyReleased { resource } => vec![ours("KeyReleased", json!({"resource": resource}))?],
            Self::WorkloadStarted { id, digest } => {
                vec![ours("WorkloadStarted", json!({"digest": digest, "id": id}))?]
            }
        })
    }
}

fn event(domain: &str, operation: &str, content: &Value) -> Result<RuntimeEvent, LogError> {
    let canonical = jcs::canonical(content).map_err(|error| LogError::Event(error.to_string()))?;
    RuntimeEvent::new(domain, operation, &String::from_utf8_lossy(&canonical))
}

/// What happened, from the events of a log that was replayed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Story {
    /// The digest of the init data, by the guest's word.
    pub init_data: Option<String>,
    /// The image policies that were used, in their order.
    pub policies: Vec<String>,
    /// The images that were admitted.
    pub images: Vec<Image>,
    /// The volumes that were opened.
    pub volumes: Vec<Volume>,
    /// The resources that were asked for.
    pub keys: Vec<String>,
    /// The containers that were started: name and manifest.
    pub workloads: Vec<(String, String)>,
    /// Events of our domain that are none of these: a guest that is newer, or confused.
    pub unknown: usize,
}

impl Story {
    /// Reads events.
    pub fn of(events: &[RuntimeEvent]) -> Self {
        let mut story = Self::default();
        for event in events.iter().filter(|event| event.domain == DOMAIN) {
            if story.add(event).is_none() {
                story.unknown += 1;
            }
        }
        story
    }

    fn add(&mut self, event: &RuntimeEvent) -> Option<()> {
        let content: Value = serde_json::from_str(&event.content).ok()?;
        let text = |name: &str| Some(content.get(name)?.as_str()?.to_owned());
        match event.operation.as_str() {
            // Started once: another one is somebody's attempt to look like another guest.
            "InitData" if self.init_data.is_none() => self.init_data = Some(text("digest")?),
            "Policy" => self.policies.push(text("digest")?),
            "ImageAdmitted" => self.images.push(serde_json::from_value(content).ok()?),
            "VolumeOpened" => self.volumes.push(serde_json::from_value(content).ok()?),
            "KeyReleased" => self.keys.push(text("resource")?),
            "WorkloadStarted" => self.workloads.push((text("id")?, text("digest")?)),
            _ => return None,
        }
        Some(())
    }

    /// As policies see it, whole.
    pub fn to_json(&self) -> Value {
        self.json(usize::MAX)
    }

    /// As a token carries it: the last entries of each kind, and how many there are.
    pub fn summary(&self) -> Value {
        self.json(MOST_IN_TOKENS)
    }

    fn json(&self, most: usize) -> Value {
        fn last<T>(list: &[T], most: usize) -> &[T] {
            list.get(list.len().saturating_sub(most)..).unwrap_or_default()
        }
        let workloads: Vec<Value> =
            last(&self.workloads, most).iter().map(|(id, digest)| json!({"digest": digest, "id": id})).collect();
        json!({
            "replayed": true,
            "init_data": self.init_data,
            "policies": last(&self.policies, most),
            "images": last(&self.images, most),
            "volumes": last(&self.volumes, most),
            "keys": last(&self.keys, most),
            "workloads": workloads,
            "unknown": self.unknown,
            "counts": {
                "policies": self.policies.len(),
                "images": self.images.len(),
                "volumes": self.volumes.len(),
                "keys": self.keys.len(),
                "workloads": self.workloads.len(),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_is_read_back() {
        let image = Image { digest: "sha256:aa".into(), image: "docker://a/b".into(), signers: vec!["key".into()] };
        let volume = Volume { anchor: "tpm".into(), id: "data".into(), protection: "disk".into(), root: String::new() };
        let digest = Digest::sha256(b"policy");
        let happenings = [
            Happening::InitData { digest: "ab".into() },
            Happening::Policy { digest },
            Happening::ImageAdmitted(image.clone()),
            Happening::VolumeOpened(volume.clone()),
            Happening::KeyReleased { resource: "a/b/c".into() },
            Happening::WorkloadStarted { id: "c1".into(), digest: "sha256:aa".into() },
        ];
        let mut events: Vec<_> = happenings.iter().flat_map(|happening| happening.events().unwrap()).collect();
        assert!(events.iter().any(|event| event.line()
            == r#"github.com/confidential-containers PullImage {"digest":"sha256:aa","image":"docker://a/b"}"#));
        events.push(RuntimeEvent::new("elsewhere", "Policy", r#"{"digest":"forged"}"#).unwrap());
        let story = Story::of(&events);
        let expected = Story {
            init_data: Some("ab".into()),
            policies: vec![digest.to_string()],
            images: vec![image],
            volumes: vec![volume],
            keys: vec!["a/b/c".into()],
            workloads: vec![("c1".into(), "sha256:aa".into())],
            unknown: 0,
        };
        assert_eq!(story, expected);
        assert_eq!(story.to_json()["counts"]["images"], 1);
    }

    #[test]
    fn events_that_are_not_understood_are_counted() {
        for (operation, content) in
            [("Policy", "x"), ("Policy", "{}"), ("ImageAdmitted", r#"{"digest":"a"}"#), ("Other", "{}")]
        {
            assert_eq!(Story::of(&[RuntimeEvent::new(DOMAIN, operation, content).unwrap()]).unknown, 1);
        }
        let twice = Happening::InitData { digest: "ab".into() }.events().unwrap();
        assert_eq!(Story::of(&[twice.clone(), twice].concat()).unknown, 1);
    }
}
