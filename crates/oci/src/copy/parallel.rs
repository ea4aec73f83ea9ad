//! Runs the copies of several blobs side by side.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use super::{CopyError, streams::Stopped};

/// Does `work` for each item with at most `width` threads; gives the results in the items' order, or the first error. After an
/// error nothing new is begun, and `work` is told by the flag to stop.
pub(super) fn each<T: Sync, R: Send>(
    items: &[T],
    width: usize,
    work: impl Fn(&T, &AtomicBool) -> Result<R, CopyError> + Sync,
) -> Result<Vec<R>, CopyError> {
    let stop = AtomicBool::new(false);
    let queue = Mutex::new(items.iter().enumerate());
    let results: Mutex<Vec<Option<R>>> = Mutex::new(items.iter().map(|_| None).collect());
    let failure: Mutex<Option<CopyError>> = Mutex::new(None);
    let worker = || {
        while !stop.load(Ordering::Relaxed) {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((number, item)) = next else { break };
            match work(item, &stop) {
                Ok(result) => {
                    if let Some(slot) = results.lock().unwrap_or_else(PoisonError::into_inner).get_mut(number) {
                        *slot = Some(result);
                    }
                }
                Err(error) => {
                    stop.store(true, Ordering::Relaxed);
                    let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
                    // One that was only told to stop is not the reason.
                    if failure.is_none() && !is_stopped(&error) {
                        *failure = Some(error);
                    }
                }
            }
        }
    };
    let width = width.clamp(1, 64).min(items.len().max(1));
    if width == 1 {
        worker();
    } else {
        thread::scope(|scope| (0..width).for_each(|_| drop(scope.spawn(worker))));
    }
    if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let results: Option<Vec<R>> = results.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().collect();
    results.ok_or_else(|| CopyError::Unsupported("a blob was not copied, and no reason given".into()))
}

fn is_stopped(error: &CopyError) -> bool {
    match error {
        CopyError::Stream { source, .. } => source.get_ref().is_some_and(|inner| inner.is::<Stopped>()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_the_order_and_the_first_error_wins() {
        let items: Vec<u32> = (0..100).collect();
        assert_eq!(each(&items, 7, |item, _| Ok(item * 2)).unwrap(), items.iter().map(|i| i * 2).collect::<Vec<_>>());
        assert!(each::<u32, u32>(&[], 3, |item, _| Ok(*item)).unwrap().is_empty());
        let error = each(&items, 4, |item, _| match item {
            50 => Err(CopyError::NotReadToEnd("fifty".into())),
            _ => Ok(()),
        });
        assert!(matches!(error, Err(CopyError::NotReadToEnd(what)) if what == "fifty"));
    }
}
