//! How much memory the index uses: publishes blocks to a new broker until the growth of its memory is significant.

use anyhow::{Context, Result};
use swiftcache_tests::node::Node;

use crate::{broker, control, report::Line};

/// Blocks in one Publish message: the protocol's bound.
const PER_MESSAGE: u32 = 65_536;
/// Publish messages. Together they have 4 Mi blocks, beside which the rest of the process does not count.
const MESSAGES: u32 = 64;

/// Publishes the blocks and measures the growth of the broker's memory.
pub(crate) async fn run(node: &Node) -> Result<Line> {
    let channel = control::connect(&node.socket()).await?;
    let before = broker::rss(node.broker()?.pid())?;
    let blocks = control::fill_index(channel, MESSAGES, PER_MESSAGE)
        .await
        .context("cannot fill the index")?;
    let after = broker::rss(node.broker()?.pid())?;
    Ok(broker::block_line(before, after, blocks))
}
