"""Real clients that keep their data: rounds whose clients are processes of their own.

`server` plays rounds over any transport, `checking` refuses what a client must not send, `site`
exports a client's step, and `standalone` is all that a client's process needs afterwards.
`flower` carries the messages. Import what you need from these modules.
"""
