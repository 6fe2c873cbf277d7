use loom::sync::Arc;
use loom::thread;
use outbox_models::model;

fn fill(ring: &Arc<Ring<2>>, ids: &'static [i64]) -> thread::JoinHandle<usize> {
    let ring = ring.clone();
    thread::spawn(move || ids.iter().filter(|id| ring.push(**id)).count())
}

/// The worker is spawned after those that push. Loom keeps one reader of each atomic: a reader that begins is forgotten for
/// the pusher's own reading, and then the pusher is not tried before it.
fn drain(ring: &Arc<Ring<2>>) -> thread::JoinHandle<Vec<i64>> {
    let ring = ring.clone();
    thread::spawn(move || std::iter::from_fn(|| ring.pop()).collect())
}

/// Whatever was pushed comes out once, each pusher's ids in their order.
pub fn ids_come_out_once_and_in_order() {
    model(|| {
        let ring = Arc::new(Ring::<2>::default());
        let pushers = [fill(&ring, &[1, 2]), fill(&ring, &[11])];
        let worker = drain(&ring);
        let pushed: usize = pushers.map(|pusher| pusher.join().unwrap()).iter().sum();
        let mut out = worker.join().unwrap();
        out.extend(std::iter::from_fn(|| ring.pop()));
        assert_eq!(out.len(), pushed, "lost or twice: {out:?}");
        let mine: Vec<i64> = out.iter().copied().filter(|id| *id < 10).collect();
        assert!([&[][..], &[1], &[2], &[1, 2]].contains(&&mine[..]), "lost or twice: {out:?}");
        assert!(out.iter().filter(|id| **id == 11).count() + mine.len() == out.len(), "lost or twice: {out:?}");
    });
}

/// What the worker pops is what was pushed.
pub fn an_id_is_there_before_its_turn() {
    model(|| {
        let ring = Arc::new(Ring::<2>::default());
        let pusher = fill(&ring, &[7]);
        let worker = drain(&ring);
        assert!(worker.join().unwrap().iter().all(|id| *id == 7), "read before it was written");
        pusher.join().unwrap();
    });
}

/// A full ring refuses, and loses nothing of what is in it.
pub fn a_full_ring_refuses() {
    model(|| {
        let ring = Arc::new(Ring::<2>::default());
        assert!(ring.push(1) && ring.push(2));
        let pusher = fill(&ring, &[3]);
        let mut out = drain(&ring).join().unwrap();
        let third = pusher.join().unwrap() == 1;
        out.extend(std::iter::from_fn(|| ring.pop()));
        assert_eq!(out, if third { vec![1, 2, 3] } else { vec![1, 2] }, "written over");
    });
}

/// Two push at once. One that has its cell and comes no further (its process was stopped) holds up what is behind it, but
/// nobody waits for it, and nothing is lost when it goes on; meanwhile the ring is not taken for empty.
pub fn a_pusher_that_is_stopped_midway_loses_nothing() {
    model(|| {
        let ring = Arc::new(Ring::<2>::default());
        let pushers = [fill(&ring, &[1]), fill(&ring, &[2])];
        let worker = drain(&ring);
        pushers.into_iter().for_each(|pusher| assert_eq!(pusher.join().unwrap(), 1));
        let mut out = worker.join().unwrap();
        assert_eq!(ring.len(), 2 - out.len() as u64, "an id is in the ring and nobody counts it");
        out.extend(std::iter::from_fn(|| ring.pop()));
        out.sort_unstable();
        assert_eq!(out, [1, 2], "lost or twice");
    });
}
