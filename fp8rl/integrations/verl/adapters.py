"""placeholder"""
def install(m): pass
