//! How often one address may call: a bucket of tokens each, refilled all the time. Their number is bounded, so that many addresses fill no
//! memory: what is full again is forgotten first.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, PoisonError},
    time::Instant,
};

/// Addresses that are remembered.
const MOST: usize = 65_536;
/// Seconds of calls that may come at once.
const BURST_SECONDS: f64 = 2.0;

struct Bucket {
    left: f64,
    at: Instant,
}

/// The buckets.
pub(crate) struct RateLimit {
    per_second: f64,
    buckets: Mutex<HashMap<IpAddr, Bucket>>,
}

/// One subscriber has a /64 of IPv6, not an address.
fn subscriber(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64))),
        v4 => v4,
    }
}

impl RateLimit {
    /// `per_second` calls of each address; 0: any number.
    pub(crate) fn new(per_second: u32) -> Self {
        Self { per_second: per_second.into(), buckets: Mutex::default() }
    }

    /// Takes a call; says whether it is within the limit.
    pub(crate) fn admits(&self, address: IpAddr, now: Instant) -> bool {
        if self.per_second <= 0.0 {
            return true;
        }
        let most = self.per_second * BURST_SECONDS;
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let refilled = |bucket: &Bucket| {
            (bucket.left + now.saturating_duration_since(bucket.at).as_secs_f64() * self.per_second).min(most)
        };
        if buckets.len() >= MOST {
            buckets.retain(|_, bucket| refilled(bucket) < most);
            if buckets.len() >= MOST {
                buckets.clear();
            }
        }
        let bucket = buckets.entry(subscriber(address)).or_insert(Bucket { left: most, at: now });
        bucket.left = refilled(bucket);
        bucket.at = now;
        if bucket.left < 1.0 {
            return false;
        }
        bucket.left -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn each_address_has_its_rate() {
        let (limit, start) = (RateLimit::new(10), Instant::now());
        let [a, b]: [IpAddr; 2] = ["10.0.0.1", "10.0.0.2"].map(|text| text.parse().unwrap());
        let count = |address, at| (0..100).filter(|_| limit.admits(address, at)).count();
        assert_eq!((count(a, start), count(b, start)), (20, 20));
        assert_eq!(count(a, start + Duration::from_secs(1)), 10);
        assert_eq!(count(a, start + Duration::from_secs(60)), 20);
        // Addresses of one subscriber are one; the mapped form of an address is that address.
        let [c, d]: [IpAddr; 2] = ["2001:db8::1", "2001:db8::ffff:2"].map(|text| text.parse().unwrap());
        assert_eq!(count(c, start) + count(d, start), 20);
        assert_eq!(count("::ffff:10.0.0.2".parse().unwrap(), start), 0);
        assert_eq!((0..1000).filter(|_| RateLimit::new(0).admits(a, start)).count(), 1000);
    }

    #[test]
    fn many_addresses_fill_no_memory() {
        let (limit, now) = (RateLimit::new(1), Instant::now());
        for number in 0..200_000u32 {
            assert!(limit.admits(IpAddr::V4(number.into()), now));
        }
        assert!(limit.buckets.lock().unwrap().len() <= MOST);
    }
}
