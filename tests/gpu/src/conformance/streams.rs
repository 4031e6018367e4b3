//! Streams: their order, their independence, and the lifetimes of memories.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use swiftcache_client::device::{CopyStream, Memory, Piece};

use crate::{pattern, subject::Subject};

const SIZE: u64 = 16 << 20;
const ALL: [Piece; 1] = [Piece {
    from: 0,
    to: 0,
    bytes: SIZE,
}];

fn memories(subject: &Subject, count: usize) -> Result<Vec<Memory>> {
    let device = subject.device()?;
    let kind = *subject
        .layer
        .handle_kinds()
        .first()
        .context("no handle kind")?;
    (0..count)
        .map(|_| Ok(subject.layer.allocate(&device, SIZE, kind)?))
        .collect()
}

pub(super) fn waits(subject: &Subject) -> Result<()> {
    let memories = memories(subject, 3)?;
    let [a, b, c] = &memories[..] else {
        anyhow::bail!("three memories");
    };
    let (first, second) = (subject.stream()?, subject.stream()?);
    pattern::write(&*first, a, 0, SIZE, 1)?;
    pattern::write(&*first, b, 0, SIZE, 2)?;
    for round in 0..8 {
        // The first stream has much work to do before it writes the bytes that the second one reads.
        for _ in 0..8 {
            first.copy(b, c, &ALL)?;
            first.copy(c, b, &ALL)?;
        }
        let source = [a, b][round % 2];
        first.copy(source, c, &ALL)?;
        let written = first.record()?;
        second.wait_for(&written)?;
        let target = [b, a][round % 2];
        second.copy(c, target, &ALL)?;
        let read = second.record()?;
        first.wait_for(&read)?;
        read.wait()?;
        ensure!(
            matches!(written.outcome(), Some(Ok(()))),
            "a stream ran ahead of the ticket it waits for"
        );
        ensure!(matches!(read.outcome(), Some(Ok(()))));
        pattern::verify(&*second, target, 0, SIZE, 1).context("the copy read too early")?;
        pattern::write(&*second, source, 0, SIZE, 2)?;
    }
    Ok(())
}

pub(super) fn concurrent(subject: &Subject) -> Result<()> {
    let streams = (0..4)
        .map(|_| subject.stream())
        .collect::<Result<Vec<Arc<dyn CopyStream>>>>()?;
    let memories = memories(subject, 2 * streams.len())?;
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for ((pair, stream), seed) in memories.chunks(2).zip(&streams).zip(10..) {
            threads.push(scope.spawn(move || -> Result<()> {
                pattern::write(&**stream, &pair[0], 0, SIZE, seed)?;
                for _ in 0..4 {
                    stream.copy(&pair[0], &pair[1], &ALL)?;
                    stream.zero(&pair[0], 0, SIZE)?;
                    stream.copy(&pair[1], &pair[0], &ALL)?;
                }
                stream.record()?.wait()?;
                pattern::verify(&**stream, &pair[0], 0, SIZE, seed)
            }));
        }
        for thread in threads {
            let joined = thread.join();
            joined.map_err(|_| anyhow::anyhow!("a copying thread panicked"))??;
        }
        Ok(())
    })
}

pub(super) fn lifetime(subject: &Subject) -> Result<()> {
    let mut memories = memories(subject, 4)?;
    let last = memories.pop().context("four memories")?;
    let stream = subject.stream()?;
    pattern::write(&*stream, &memories[0], 0, SIZE, 7)?;
    for pair in memories.windows(2) {
        stream.copy(&pair[0], &pair[1], &ALL)?;
    }
    stream.copy(&memories[2], &last, &ALL)?;
    let ticket = stream.record()?;
    // After this only the stream holds the first three memories, and then nobody holds the stream.
    drop(memories);
    drop(stream);
    ticket.wait()?;
    pattern::verify(&*subject.stream()?, &last, 0, SIZE, 7)
}

pub(super) fn lost_device(subject: &Subject) -> Result<()> {
    let Some(lose) = &subject.lose else {
        return Ok(()); // A real device is not broken on purpose.
    };
    let device = subject.device()?;
    let memories = memories(subject, 2)?;
    let (stream, waiting) = (subject.stream()?, subject.stream()?);
    stream.copy(&memories[0], &memories[1], &ALL)?;
    let before = stream.record()?;
    before.wait()?;
    lose(&device)?;
    // Some backends report the loss when work is queued, others when it completes. One of the two must fail, for good.
    let after = |stream: &dyn CopyStream| {
        stream.copy(&memories[0], &memories[1], &ALL)?;
        stream.record()
    };
    let failed = match after(&*stream) {
        Err(_) => None,
        Ok(ticket) => {
            ensure!(ticket.wait().is_err(), "a copy on a lost device succeeded");
            let again = ticket.outcome();
            ensure!(matches!(again, Some(Err(_))), "a failed ticket forgot it");
            Some(ticket)
        }
    };
    if let Some(ticket) = failed {
        let poisoned = waiting.wait_for(&ticket).and_then(|()| waiting.record());
        let outcome = poisoned.and_then(|ticket| ticket.wait());
        ensure!(outcome.is_err(), "waiting for a failed ticket succeeded");
    }
    let later = after(&*stream).and_then(|ticket| ticket.wait());
    let error = later.err().context("a lost device came back")?;
    ensure!(
        error.to_string().contains(device.as_str()),
        "{error} does not name the device"
    );
    Ok(())
}
