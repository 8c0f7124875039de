"""What a report looks like, and the words that it explains."""

from __future__ import annotations

GLOSSARY = (
    ("rank", "A process of the job. Some are shards, some are workers, some are both."),
    ("shard", "Holds a part of the parameters, and applies the gradients that are pushed to it."),
    ("replica", "A copy of the model that learns from its own share of the samples: one worker, or several together."),
    ("compute", "A worker computes the loss and its gradient."),
    ("exchange", "Workers of one replica exchange values, and wait for the slowest of them."),
    ("data", "A worker reads its next samples."),
    ("fetch", "A worker gets parameters from the shards."),
    ("push", "A worker hands its gradient to the shards."),
    ("wait", "A worker waits for others, or evaluates held-out samples."),
    ("apply", "A shard applies gradients to the parameters by the update rule."),
    ("serve", "A shard does other work for the workers, such as moving data."),
    ("idle", "A shard has nothing to do."),
    ("staleness", "How many updates by others a shard has applied between a worker's fetch and its push."),
)
"""Words and their meanings."""

STYLE = """
:root { color-scheme: light dark; }
:root { --ink: #1c2430; --quiet: #5b6675; --line: #d8dee6; --page: #f5f7fa; --card: #fff; --link: #0060a8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --quiet: #9aa6b5; --line: #38424f; --page: #14181e; --card: #1d232b; --link: #6cb6ff; }
}
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); }
header, main, footer { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
h1 { font-size: 1.9rem; margin: 1.6rem 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0 0 .8rem; }
.lead { color: var(--quiet); max-width: 75ch; margin: 0 0 1.2rem; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 1.5rem; line-height: 1.3; }
.card span { display: block; }
.card small { color: var(--quiet); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 1.1rem 0; }
a { color: var(--link); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 18px; margin: 0 0 18px; }
section > p { max-width: 80ch; margin: 0 0 1rem; color: var(--quiet); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 14px; }
.grid { align-items: start; }
img { width: 100%; height: auto; background: #fff; border-radius: 4px; }
.scroll { overflow-x: auto; }
.wide img { min-width: 760px; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; }
.left { text-align: left; }
td.left { max-width: 40ch; overflow: hidden; text-overflow: ellipsis; }
.matrix td, .matrix th { text-align: center; padding: 4px 8px; border: 0; }
summary { cursor: pointer; margin: .8rem 0 .4rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: .4rem 0; }
dt { font-weight: 600; }
dd { margin: 0; color: var(--quiet); }
code { white-space: nowrap; }
pre { overflow-x: auto; max-height: 32rem; font-size: .85rem; }
footer { color: var(--quiet); font-size: .85rem; padding-bottom: 2rem; }
@media (max-width: 600px) {
  code { white-space: normal; }
  section { padding: 14px; overflow-wrap: anywhere; }
  th, td { padding-right: 9px; }
  .matrix td, .matrix th { padding: 3px 5px; }
}
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""
"""The style sheet; all of it, as nothing is loaded."""
