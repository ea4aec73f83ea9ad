//! The claims of TDX and SGX quotes, by the names that policies of other brokers use.

use nacre_attest::evidence::hex;
use serde_json::{Map, Value, json};

use super::{
    pck::Platform,
    quote::{Body, Quote, at},
};

/// Names, offsets and lengths of a report's fields.
type Fields = &'static [(&'static str, usize, usize)];

const TD: Fields = &[
    ("tcb_svn", 0, 16),
    ("mr_seam", 16, 48),
    ("mrsigner_seam", 64, 48),
    ("seam_attributes", 112, 8),
    ("td_attributes", 120, 8),
    ("xfam", 128, 8),
    ("mr_td", 136, 48),
    ("mr_config_id", 184, 48),
    ("mr_owner", 232, 48),
    ("mr_owner_config", 280, 48),
    ("rtmr_0", 328, 48),
    ("rtmr_1", 376, 48),
    ("rtmr_2", 424, 48),
    ("rtmr_3", 472, 48),
    ("report_data", 520, 64),
];
const TD_15: Fields = &[("tee_tcb_svn2", 0, 16), ("mr_servicetd", 16, 48)];
const SGX: Fields = &[
    ("cpu_svn", 0, 16),
    ("misc_select", 16, 4),
    ("reserved1", 20, 12),
    ("isv_ext_prod_id", 32, 16),
    ("attributes.flags", 48, 8),
    ("attributes.xfrm", 56, 8),
    ("mr_enclave", 64, 32),
    ("reserved2", 96, 32),
    ("mr_signer", 128, 32),
    ("reserved3", 160, 32),
    ("config_id", 192, 64),
    ("isv_prod_id", 256, 2),
    ("isv_svn", 258, 2),
    ("config_svn", 260, 2),
    ("reserved4", 262, 42),
    ("isv_family_id", 304, 16),
    ("report_data", 320, 64),
];

fn fields(bytes: &[u8], fields: Fields) -> Map<String, Value> {
    let value = |(name, from, length): &(&str, usize, usize)| {
        ((*name).to_owned(), hex(bytes.get(*from..from + length).unwrap_or_default()).into())
    };
    fields.iter().map(value).collect()
}

/// The quote's own claims; the caller adds the verdict.
pub(crate) fn claims(quote: &Quote<'_>, platform: &Platform) -> Map<String, Value> {
    let header = quote.header;
    let mut claims = match quote.body {
        Body::Td(td, more) => {
            let mut body = fields(td, TD);
            if let Some(more) = more {
                body.extend(fields(more, TD_15));
            }
            let header = json!({
                "version": hex(&at::<2>(header, 0)), "att_key_type": hex(&at::<2>(header, 2)),
                "tee_type": hex(&at::<4>(header, 4)), "reserved": hex(&at::<4>(header, 8)),
                "vendor_id": hex(&at::<16>(header, 12)), "user_data": hex(&at::<20>(header, 28)),
            });
            let mut whole = json!({"header": header, "body": body});
            if let Some((kind, size)) = quote.kind {
                whole["type"] = hex(&kind.to_le_bytes()).into();
                whole["size"] = hex(&size.to_le_bytes()).into();
            }
            let attributes = u64::from_le_bytes(at(td, 120));
            let is_set = |bit: u32| attributes >> bit & 1 == 1;
            json!({
                "quote": whole,
                "td_attributes": {
                    "debug": is_set(0), "septve_disable": is_set(28), "migratable": is_set(29),
                    "protection_keys": is_set(30), "key_locker": is_set(31), "perfmon": is_set(63),
                },
                "report_data": hex(&at::<64>(td, 520)),
                "init_data": hex(&at::<48>(td, 184)),
            })
        }
        Body::Sgx(report) => json!({
            "header": {
                "version": hex(&at::<2>(header, 0)), "att_key_type": hex(&at::<2>(header, 2)),
                "att_key_data_0": hex(&at::<4>(header, 4)), "qe_svn": hex(&at::<2>(header, 8)),
                "pce_svn": hex(&at::<2>(header, 10)), "vendor_id": hex(&at::<16>(header, 12)),
                "user_data": hex(&at::<20>(header, 28)),
            },
            "body": fields(report, SGX),
            "debug": at::<1>(report, 48)[0] & 2 != 0,
            "report_data": hex(&at::<64>(report, 320)),
            "init_data": hex(&at::<64>(report, 192)),
        }),
    };
    let kind = match platform.kind {
        0 => "Standard",
        1 => "Scalable",
        2 => "Scalable with Integrity",
        _ => "Unknown",
    };
    claims["sgx_type"] = kind.into();
    claims["fmspc"] = hex(&platform.fmspc).into();
    claims["is_dynamic_platform"] = platform.dynamic.into();
    claims["is_cached_keys"] = platform.cached_keys.into();
    claims["is_smt_enabled"] = platform.smt.into();
    if let Some(instance) = platform.instance {
        claims["platform_instance_id"] = hex(&instance).into();
    }
    match claims {
        Value::Object(claims) => claims,
        _ => Map::new(),
    }
}
