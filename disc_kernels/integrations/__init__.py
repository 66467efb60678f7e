"""Put the losses into other people's trainers and in place of other people's losses; nothing is imported of theirs."""
