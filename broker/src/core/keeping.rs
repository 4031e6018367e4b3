//! Keeping: borrowers say what they are and which blocks they keep in their own host memory.

use super::{
    books::Books,
    borrowers::Nature,
    effect::{Note, Refusal, Reply},
    event::Keep,
    publishing::may_index,
};

pub(super) fn keep(books: &mut Books, keep: Keep) -> Result<Reply, Refusal> {
    books.sessions.of(keep.caller)?;
    let session = keep.caller.session;
    let known = books.borrowers.get(keep.borrower);
    if known.is_some_and(|known| known.session() != session) {
        return Err(Refusal::NotYours {
            what: "borrower",
            which: keep.borrower.to_string(),
        });
    }
    if keep.closed {
        books.borrowers.close(keep.borrower);
        return Ok(Reply::Done);
    }
    let most = books.config.max_borrowers_per_session;
    if known.is_none() && books.borrowers.of(session).count() >= most {
        return Err(Refusal::Limit {
            what: "borrowers of one session",
            limit: most as u64,
        });
    }
    let layers = keep.layer_bytes.iter();
    let total = layers.fold(0_u64, |sum, bytes| sum.saturating_add(*bytes));
    if !keep.layer_bytes.is_empty() && total != keep.block_bytes {
        return Err(Refusal::Invalid {
            field: "layer_bytes",
            problem: format!("are {total} bytes in all; a block has {}", keep.block_bytes),
        });
    }
    may_index(books, session, keep.kept.len())?;
    let nature = Nature {
        session,
        namespace: keep.namespace.into(),
        device: books.devices.number(&keep.device).ok(),
        block_bytes: keep.block_bytes,
        shares: keep.shares,
        // One that the broker does not know has nothing on it that could be found.
        down: (keep.down.iter())
            .filter_map(|uuid| books.devices.number(uuid).ok())
            .collect(),
        host_down: keep.host_down,
        host_memory: keep.host_memory,
        layer_bytes: keep.layer_bytes.into(),
    };
    if !nature.layer_bytes.is_empty() {
        // What it has published may wait for that.
        books.note(Note::DiskWork);
    }
    let (id, anew) = (keep.borrower, keep.anew);
    books
        .borrowers
        .keep(id, nature, anew, &keep.dropped, keep.kept);
    Ok(Reply::Done)
}
