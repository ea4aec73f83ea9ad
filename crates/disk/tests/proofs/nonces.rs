//! No key and nonce are used twice, whatever the host does.

use std::{sync::Arc, time::Duration};

use nacre_testkit::{
    Rng,
    sim::{Model, Profile, Workload, seeds},
};

use crate::rig::{LITTLE_MEMORY, Ledger, Medium, Rig, Setup};

/// One disk and its whole history: closes, crashes with any part of the window, and the host that goes back to any image that it has
/// ever seen, also in the middle of an open disk; then the guest works on. Every encryption is in the ledger.
#[test]
fn no_nonce_is_used_twice_over_crashes_and_rollbacks() {
    seeds(51, Duration::from_secs(15), |seed| {
        let rng = &mut Rng::new(seed);
        let ledger = Arc::new(Ledger::default());
        let memory = *rng.pick(&[LITTLE_MEMORY, 64 << 20]);
        let setup = Setup { audit: Some(ledger.clone()), memory, ..Setup::default() };
        let mut images: Vec<(Medium, Model)> = vec![(setup.format(), Model::new(setup.blocks()))];
        for _ in 0..30 {
            let (medium, model) = rng.pick(&images).clone();
            let mut rig = Rig::on(&setup, &medium, model);
            let profile = Profile { regions: 10, longest: 8, flush: 20, ..Profile::default() };
            rig.work(&mut Workload::new(rng.next_u64(), setup.blocks(), &profile), 60);
            // A copy of the running disk, as a snapshot of a virtual machine takes it, and what a crash leaves.
            rig.flush();
            let mut model = rig.model.clone();
            model.crash_to(model.step());
            images.push((rig.at().medium(), model.clone()));
            if rng.below(2) == 0 {
                rig.crash(rng);
                rig.verify();
            }
            let step = rig.model.step();
            let (medium, past) = rig.close();
            let mut model = past.model;
            model.crash_to(step);
            images.push((medium, model));
        }
        let count = ledger.count();
        assert!(count > 1000 && ledger.keys() > 60, "{count} messages under {} keys", ledger.keys());
        println!("seed {seed}: {count} messages under {} keys", ledger.keys());
    });
}

/// Two guests that have the same image open at the same time.
#[test]
fn two_guests_on_copies_of_one_image_never_share_a_nonce() {
    let ledger = Arc::new(Ledger::default());
    let setup = Setup { audit: Some(ledger.clone()), ..Setup::default() };
    let medium = setup.format();
    let mut rigs: Vec<Rig> = (0..4).map(|_| Rig::on(&setup, &medium, Model::new(setup.blocks()))).collect();
    let profile = Profile { crash: 0, reopen: 0, ..Profile::default() };
    for (number, rig) in rigs.iter_mut().enumerate() {
        // The same requests, so that the same counters seal different data.
        rig.work(&mut Workload::new(5 + number as u64 % 2, setup.blocks(), &profile), 200);
    }
    for rig in rigs {
        rig.close();
    }
    assert!(ledger.count() > 1000);
}
