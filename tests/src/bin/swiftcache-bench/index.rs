//! What the index weighs: blocks published into a fresh broker until its memory says something.

use anyhow::{Context, Result};
use swiftcache_tests::node::Node;

use crate::{broker, control, report::Line};

/// Blocks in one publication: the protocol's bound.
const PER_MESSAGE: u32 = 65_536;
/// Publications; 4 Mi blocks make the rest of the process vanish in the noise.
const MESSAGES: u32 = 64;

/// Publishes and measures.
pub(crate) async fn run(node: &Node) -> Result<Line> {
    let channel = control::connect(&node.socket()).await?;
    let before = broker::rss(node.broker()?.pid())?;
    let blocks = control::fill_index(channel, MESSAGES, PER_MESSAGE)
        .await
        .context("cannot fill the index")?;
    let after = broker::rss(node.broker()?.pid())?;
    Ok(broker::block_line(before, after, blocks))
}
