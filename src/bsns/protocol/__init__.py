"""What peers say to each other: one file per conversation, one dataclass per message.

frames      how a message and its tensors become bytes, with every length bounded
greeting    who may talk: Hello and Welcome
inference   a session's life on a stage: Open, Step, Result, Close
probing     how long so many bytes take from one member to another
records     what a node announces about itself
plans       the orchestrator's lease, and the plan in force under it
codecs      activations in fewer bits: names, layouts, how far they may be off
tensors     how a message describes the tensors in its frame
membership  invites and the certificates made from them

Client and worker share these words and nothing else. docs/protocol.md is the same in prose.
"""
