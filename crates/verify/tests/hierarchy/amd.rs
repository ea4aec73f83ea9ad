//! AMD's: ARK, ASK, ASVK, VCEK, VLEK, and reports that they sign.

use nacre_attest::snp_report::{LENGTH, Product, SIGNED, SnpReport};
use nacre_verify::snp::AmdRoots;
use rcgen::PKCS_ECDSA_P384_SHA384 as P384;
use ring::signature::ECDSA_P384_SHA384_FIXED_SIGNING;

use super::{Node, Wish, tlv};

pub(crate) const CHIP: [u8; 64] = [7; 64];
/// The ASK's serial number, for revocation lists.
pub(crate) const ASK: u64 = 2;

pub(crate) struct Amd {
    pub(crate) product: Product,
    pub(crate) ark: Node,
    pub(crate) ask: Node,
    pub(crate) asvk: Node,
}

/// The versions that a certificate is for: FMC, bootloader, TEE, SNP, microcode.
pub(crate) type Versions = (Option<u8>, u8, u8, u8, u8);

impl Amd {
    pub(crate) fn new(product: Product) -> Self {
        let name = product.name();
        let ark = Wish::new(&format!("ARK-{name}"), 1, true).root(&P384);
        let ask = Wish::new(&format!("SEV-{name}"), ASK, true).below(&ark, &P384);
        let asvk = Wish::new(&format!("SEV-VLEK-{name}"), 3, true).below(&ark, &P384);
        Self { product, ark, ask, asvk }
    }

    pub(crate) fn roots(&self) -> AmdRoots {
        let mut roots = AmdRoots::default();
        roots.trust(self.product, &[&*self.ask.pem, &self.ark.pem, &self.asvk.pem].concat()).unwrap();
        roots
    }

    /// What a key certificate says.
    pub(crate) fn wish(name: &str, versions: Versions, chip: Option<&[u8]>) -> Wish {
        let mut wish = Wish::new(name, 0, false);
        let number = |value: u8| if value > 127 { vec![2, 2, 0, value] } else { vec![2, 1, value] };
        let (fmc, bootloader, tee, snp, microcode) = versions;
        let mut add = |last: u64, value: u8| {
            wish.extensions.push((vec![1, 3, 6, 1, 4, 1, 3704, 1, 3, last], number(value)));
        };
        for (last, value) in [(1, bootloader), (2, tee), (3, snp), (8, microcode)] {
            add(last, value);
        }
        if let Some(fmc) = fmc {
            add(9, fmc);
        }
        if let Some(chip) = chip {
            wish.extensions.push((vec![1, 3, 6, 1, 4, 1, 3704, 1, 4], tlv(4, chip)));
        }
        wish
    }

    pub(crate) fn vcek(&self, versions: Versions, chip: &[u8]) -> Node {
        Self::wish("SEV-VCEK", versions, Some(chip)).below(&self.ask, &P384)
    }

    pub(crate) fn vlek(&self, versions: Versions) -> Node {
        Self::wish("SEV-VLEK", versions, None).below(&self.asvk, &P384)
    }
}

/// A report to be signed.
#[derive(Clone)]
pub(crate) struct Draft(pub(crate) Box<[u8; LENGTH]>);

impl Draft {
    /// Of a guest without faults on Milan, version 3, by the versions of [`VERSIONS`].
    pub(crate) fn new() -> Self {
        let mut draft = Self(Box::new([0; LENGTH]));
        draft.put(0, &3_u32.to_le_bytes());
        draft.put(8, &0x3_0000_u64.to_le_bytes());
        draft.put(0x34, &1_u32.to_le_bytes());
        draft.put(0x50, &[5; 64]);
        draft.put(0x90, &[9; 48]);
        draft.put(0x180, &[3, 0, 0, 0, 0, 0, 8, 200]);
        draft.put(0x188, &[0x19, 1, 1]);
        draft.put(0x1a0, &CHIP);
        draft
    }

    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub(crate) fn signed(&self, key: &Node) -> SnpReport {
        let mut bytes = self.0.clone();
        let signature = key.sign(&ECDSA_P384_SHA384_FIXED_SIGNING, &bytes[..SIGNED]);
        for (at, number) in [(0x2a0, &signature[..48]), (0x2e8, &signature[48..])] {
            bytes[at..at + 48].copy_from_slice(&number.iter().rev().copied().collect::<Vec<_>>());
        }
        SnpReport::from_bytes(&bytes[..]).unwrap()
    }
}

pub(crate) const VERSIONS: Versions = (None, 3, 0, 8, 200);
